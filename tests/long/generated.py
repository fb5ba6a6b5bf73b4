"""What storing generated KV costs: not at all, with LMCache's save_decode_cache, when requests end.

`pytest -s tests/long/generated.py`: two engines, in turns.
"""

import random
import re
import statistics
import time
from concurrent.futures import ThreadPoolExecutor

from conftest import CHUNK
from waiting import until

from kvshare.core import policy

PROMPT, GENERATED, REQUESTS, TURNS = CHUNK + 10, 4 * CHUNK, 4, 3
CHUNKS = (PROMPT + GENERATED - 1) // CHUNK - PROMPT // CHUNK  # that an answer fills
COST = re.compile(r"Stored (\d+) out of total (\d+) tokens.*?cost ([\d.]+) ms")


def test_cost(start_engine):
    plain = start_engine(0, "plain", LMCACHE_LOG_LEVEL="INFO")
    always = start_engine(1, "always", LMCACHE_LOG_LEVEL="INFO", LMCACHE_SAVE_DECODE_CACHE="true")
    modes = {
        "not stored": (plain.wait(), None, 0),
        "save_decode_cache": (always.wait(), None, CHUNKS),
        "when requests end": (plain, {policy.STORE: policy.ALWAYS}, 1),
    }
    measured = {mode: [] for mode in modes}
    for turn in range(TURNS):
        for mode, (engine, configs, stores) in modes.items():
            measured[mode].append(one(engine, configs, stores, f"{mode} {turn}"))
    for mode, found in measured.items():
        stores, busy, seconds = (statistics.median(values) for values in zip(*found, strict=True))
        print(f"{mode:20} {stores:3.0f} stores of generated chunks, {busy:6.1f} ms in them, {seconds:5.1f} s in all")
        assert {stores for stores, _, _ in found} == {REQUESTS * modes[mode][2]}


def one(engine, configs, stores, name):
    """Stores of what was generated, milliseconds in these, and seconds until all have answered."""
    rng = random.Random(name)
    prompts = [[rng.randrange(300, 700) for _ in range(PROMPT)] for _ in range(REQUESTS)]
    start, size, began = len(engine.events), engine.log.stat().st_size, time.monotonic()
    with ThreadPoolExecutor(REQUESTS) as pool:
        list(pool.map(lambda prompt: engine.ask(prompt, "run-1", GENERATED, configs), prompts))
    seconds = time.monotonic() - began

    def all_stored():
        return [e for e in engine.events[start:] if e["op"] == "stored"][REQUESTS * (1 + stores) - 1 :]

    until(all_stored, engine.process)
    made = [event for event in engine.events[start:] if event["op"] == "store"]
    costs = [float(cost) for _, total, cost in COST.findall(engine.log.read_text()[size:]) if int(total) > PROMPT]
    return len(made) - REQUESTS, sum(costs), seconds
