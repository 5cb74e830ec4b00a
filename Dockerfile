# The base brings only the driver's counterpart and a compiler for Triton's launchers: the pinned torch wheel carries
# its own CUDA 13.0 libraries, and nothing installs torch a second time.
#   docker build -t speedrun .
#   docker run --gpus all --ipc host -v "$PWD/data:/speedrun/data" -v "$PWD/records:/speedrun/records" -it speedrun
FROM nvidia/cuda:13.0.1-base-ubuntu24.04
RUN apt-get update && apt-get install -y --no-install-recommends gcc git libc6-dev python3-dev python3-pip python3-venv \
    && rm -rf /var/lib/apt/lists/*
ENV PATH=/opt/venv/bin:$PATH
RUN python3 -m venv /opt/venv
WORKDIR /speedrun
COPY requirements.txt .
RUN pip install --no-cache-dir -r requirements.txt
COPY train_gpt.py triton_kernels.py runtime.py sample.py evaluate.py run.sh requirements-dev.txt ./
COPY data/*.py data/*.md data/*.npz data/
COPY tests tests
CMD ["./run.sh"]
