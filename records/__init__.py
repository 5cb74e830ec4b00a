"""Tools for the logs of this folder; `python -m records` lists them."""
