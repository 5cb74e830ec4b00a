"""Simulation of the barriers of triton_kernels.py's _hopper_relu_square_backward: python 13_barriers.py [runs] [seed].

One program: the loading warp, two groups that multiply in turns, and the asynchronous engines (loads, stores,
products), each a generator; a scheduler picks any runnable one. Waits, arrivals, phases and counts are the kernel's.
Found are: deadlock, data overwritten before or while they are read, wrong data read, a parity that stands for another
phase, barrier overflow, missing or doubled outputs, stores still unread at the end. `BUGS` are mutations that it must
find.
"""
import random
import sys


class Fault(Exception):
    pass


def check(good, what):
    if not good:
        raise Fault(what)


class Barrier:
    def __init__(self, count):
        self.count, self.pending, self.tx, self.phase = count, count, 0, 0

    def settle(self):
        check(self.pending >= 0, "more arrivals than the count")
        if self.pending == 0 and self.tx == 0:
            self.pending, self.phase = self.count, self.phase + 1

    def arrive(self):
        self.pending -= 1
        self.settle()

    def expect(self, size):  # mbarrier.arrive.expect_tx
        self.tx += size
        self.arrive()

    def complete(self, size):
        self.tx -= size
        self.settle()

    def passed(self, parity):
        return self.phase & 1 != parity


class Buffer:
    """content: a tag, or None while it is being written. readers: asynchronous reads under way."""
    def __init__(self):
        self.content, self.readers = "rubbish", 0


class Program:
    def __init__(self, rng, tiles, steps, stages, parts, slots, lag, backward, stores, bug=None):
        self.__dict__.update(locals())
        self.full = [Barrier(1) for _ in range(stages)]
        self.empty = [Barrier(2 if bug == "count" else 1) for _ in range(stages)]
        self.turns = [Barrier(1), Barrier(1)]
        self.loaded = [Barrier(1), Barrier(1)]
        self.a = [Buffer() for _ in range(stages)]
        self.w = [Buffer() for _ in range(stages)]
        self.parts_of = [[Buffer() for _ in range(slots * stores)] for _ in range(2)]
        self.outputs = set()
        self.tasks = []

    def wait(self, barrier, parity, phase):
        """phase: the number of phases that must be complete, which the kernel knows only by its parity."""
        while not barrier.passed(parity):
            yield False
        check(barrier.phase == phase, f"waited for phase {phase}, passed in phase {barrier.phase}")
        yield True

    def tma_load(self, buffer, tag, barrier, size):
        check(buffer.readers == 0, f"load of {tag} over {buffer.content} while it is read")
        buffer.content = None

        def run():
            for _ in range(self.rng.randrange(6)):
                yield True
            check(buffer.readers == 0 and buffer.content is None, "read or written during a load")
            buffer.content = tag
            barrier.complete(size)
        self.tasks.append(run())

    def read(self, buffer, tag):
        check(buffer.content == tag, f"read {buffer.content} in place of {tag}")

    def producer(self):
        step = 0
        for tile in self.tiles:
            for k in range(self.steps):
                s = step % self.stages
                parity = step // self.stages & 1 ^ (0 if self.bug == "parity" else 1)
                yield from self.wait(self.empty[s], parity, step // self.stages)
                self.full[s].expect(1 + 4)
                yield True
                self.tma_load(self.a[s], ("a", tile, k), self.full[s], 1)
                yield True
                self.tma_load(self.w[s], ("w", tile, k), self.full[s], 4)
                yield True
                step += 1

    def consumer(self, i):
        parts, loaded, mmas, groups = self.parts_of[i], self.loaded[i], [], []

        def mma(s, tile, k):  # issue; the engine runs one consumer's in order, and reads from issue to completion
            for buffer, tag in ((self.a[s], ("a", tile, k)), (self.w[s], ("w", tile, k))):
                self.read(buffer, tag)
                buffer.readers += 1
            job = {"done": False}
            mmas.append(job)
            ahead = mmas[-2] if len(mmas) > 1 else {"done": True}

            def run():
                while not ahead["done"]:
                    yield False
                for _ in range(self.rng.randrange(8)):
                    yield True
                for buffer, tag in ((self.a[s], ("a", tile, k)), (self.w[s], ("w", tile, k))):
                    self.read(buffer, tag)
                    buffer.readers -= 1
                job["done"] = True
            self.tasks.append(run())

        def mma_wait(pending):
            while not all(job["done"] for job in mmas[:len(mmas) - pending]):
                yield False
            yield True

        def tma_store(buffer, tag):
            self.read(buffer, tag)
            buffer.readers += 1
            group = {"read": False}
            groups.append(group)

            def run():
                for _ in range(self.rng.randrange(12)):
                    yield True
                self.read(buffer, tag)
                buffer.readers -= 1
                group["read"] = True
                check(tag not in self.outputs, f"{tag} stored twice")
                self.outputs.add(tag)
            self.tasks.append(run())

        def store_wait(pending):
            while not all(group["read"] for group in groups[:len(groups) - pending]):
                yield False
            yield True

        step, turn = i * self.steps, 0
        for tile in self.tiles[i::2]:
            if self.bug != "store_wait":
                yield from store_wait(0)
            if self.backward:
                loaded.expect(self.parts)
                yield True
                for p in range(self.parts):
                    self.tma_load(parts[p], ("post", tile, p), loaded, 1)
                    yield True
            if self.bug != "turn":
                yield from self.wait(self.turns[i], turn & 1 ^ (1 - i), turn + i)
            for k in range(self.steps):
                s = (step + k) % self.stages
                yield from self.wait(self.full[s], (step + k) // self.stages & 1, (step + k) // self.stages + 1)
                if k == self.steps - 1:
                    self.turns[1 - i].arrive()
                    yield True
                mma(s, tile, k)
                yield True
                yield from mma_wait(2 if self.bug == "early" else 1)
                if k > 0:
                    self.empty[(step + k - 1) % self.stages].arrive()
                yield True
            yield from mma_wait(0)
            if not (self.bug == "last" and self.steps % self.stages == 0):
                self.empty[(step + self.steps - 1) % self.stages].arrive()
            yield True
            step += 2 * self.steps
            if self.backward:
                yield from self.wait(loaded, turn & 1, turn + 1)
            turn += 1
            for p in range(self.parts):
                slot = p % self.slots
                if p >= self.slots:
                    yield from store_wait((self.slots - (0 if self.bug == "slots" else 1)) * self.stores)
                if self.backward:
                    self.read(parts[slot], ("post", tile, p))
                    yield True
                for j in range(self.stores):  # the output, and post8
                    buffer = parts[slot + j * self.slots]
                    check(buffer.readers == 0 and buffer.content is not None, "store over a buffer in use")
                    buffer.content = ("out", i, tile, p, j)
                    yield True
                for j in range(self.stores):
                    tma_store(parts[slot + j * self.slots], ("out", i, tile, p, j))
                    yield True
        yield from store_wait(0)

    def run(self):
        self.tasks += [self.producer(), self.consumer(0), self.consumer(1)]
        weights = {id(t): self.rng.choice((1, 1, 3, 10)) for t in self.tasks}
        stuck = 0
        while self.tasks:
            task = self.rng.choices(self.tasks, [weights.get(id(t), 2) for t in self.tasks])[0]
            try:
                stuck = 0 if next(task) else stuck + 1
            except StopIteration:
                self.tasks = [t for t in self.tasks if t is not task]
                stuck = 0
            if stuck > 60:  # perhaps only bad luck: has anyone a step to take?
                moved = False
                for task in list(self.tasks):
                    try:
                        moved |= bool(next(task))
                    except StopIteration:
                        self.tasks = [t for t in self.tasks if t is not task]
                        moved = True
                check(moved, "deadlock")
                stuck = 0
        wanted = {("out", i, t, p, j) for i in (0, 1) for t in self.tiles[i::2] for p in range(self.parts)
                  for j in range(self.stores)}
        check(self.outputs == wanted, "outputs are missing")
        check(all(b.readers == 0 for b in self.a + self.w + sum(self.parts_of, [])), "reads under way at the end")
        total = len(self.tiles) * self.steps
        for s in range(self.stages):
            uses = (total - s + self.stages - 1) // self.stages
            check(self.full[s].phase == self.empty[s].phase == uses and self.full[s].tx == 0, "barriers not at rest")


def draw(rng, bug=None):
    stages, parts, backward = rng.randint(2, 6), rng.choice((1, 2, 4)), rng.random() < 0.5
    programs, total = rng.randint(1, 6), rng.randint(0, 24)
    tiles = list(range(rng.randrange(programs), total, programs))  # [] when the grid is larger than the tiles
    slots = parts if backward else rng.choice([s for s in (1, 2, 4) if s <= parts])
    return Program(rng, tiles, rng.randint(1, 14), stages, parts, slots, rng.randrange(stages), backward,
                   1 if backward else rng.choice((1, 2)), bug)


BUGS = "parity", "count", "store_wait", "early", "last", "slots", "turn"

if __name__ == "__main__":
    runs, seed = (int(x) for x in (sys.argv[1:] + ["3000", "0"][len(sys.argv) - 1:]))
    for n in range(runs):
        program = draw(random.Random(seed * 10**6 + n))
        try:
            program.run()
        except Fault as fault:
            print("FAULT", n, fault, {k: v for k, v in vars(program).items() if isinstance(v, (int, list)) and k not in
                                      ("full", "empty", "a", "w", "parts_of", "tasks", "loaded")})
            raise SystemExit(1) from None
    print(f"{runs} programs without fault")
    for bug in BUGS:
        found = {}
        for n in range(300):
            try:
                draw(random.Random(n), bug).run()
            except Fault as fault:
                what = str(fault).split(" of ")[0].split(" phase")[0][:30]
                found[what] = found.get(what, 0) + 1
        print("mutation", bug, "found in", sum(found.values()), "of 300:", found)
