"""`kvshare bench`, on the session's two engines and on made-up samples."""

import asyncio
import json

import pytest
from conftest import CHUNK, ROOT
from typer.testing import CliRunner

from kvshare.cli.main import app
from kvshare.core.errors import UserError
from kvshare.tools.bench import endpoint, engines, grpo, run, tables
from kvshare.tools.bench.asked import Asked
from kvshare.tools.bench.engines import Engines
from kvshare.tools.bench.rollouts import kinds, measure
from kvshare.tools.bench.workloads import Workload, tokens_of


def row(first, shared=0, **more):
    sample = {
        "first": first,
        "end": first + 0.1,
        "computed": 1025 - shared,
        "shared": shared,
        "logprob_difference": 0.0,
    }
    return {"tokens": 1024, "answer": 11, "samples": [sample] * 3, **more}


RESULT = {
    "machine": "1 core",
    "copy": ("memory to memory", 1e9),
    "kv_bytes_a_token": 1000,
    "cases": [
        row(0.2, case="none", at_once=1),
        row(0.21, case="miss", at_once=1),
        row(0.05, 1024, case="shared", at_once=1),
        row(0.02, case="local", at_once=1),
    ],
    "patterns": [row(0.3, 1024, routing="kvshare", n=8)],
}


def test_table():
    lines = tables.markdown(RESULT).splitlines()
    (case,) = (line for line in lines if line.startswith("| 1,024 | 1 |"))
    assert case.split(" | ")[2:6] == [
        "200.0 (200.0–200.0)",
        "210.0 (210.0–210.0)",
        "50.0 (50.0–50.0)",
        "20.0 (20.0–20.0)",
    ]
    assert case.endswith("| 1,024 | 1 | 1.0 | 4.0 |")  # tokens found, MB, ms of the copy alone, times faster
    assert any(line.startswith("| 1,024 | 8 | kvshare | 0.00 | 1,024 |") for line in lines)
    assert "no connector 10.0" in lines[-5]  # ms of a later token


def test_plot(tmp_path):
    tables.plot(RESULT, tmp_path / "bench.svg")
    assert (tmp_path / "bench.svg").read_text().startswith("<?xml")


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        ("services: [", "start from"),
        ("engine: x", "must have the keys"),
        ("{backend: lm, arguments: [], engine: x, connector: {}, environment: {}}", "backend must be one of"),
        ("{backend: p2p, arguments: 1, engine: x, connector: {}, environment: {}}", "arguments must be a list"),
    ],
)
def test_bad_config(tmp_path, text, wrong):
    (tmp_path / "bench.yaml").write_text(text)
    with pytest.raises(UserError, match=wrong):
        engines.read(tmp_path / "bench.yaml")


@pytest.mark.parametrize("path", sorted((ROOT / "config" / "bench").iterdir()), ids=lambda path: path.stem)
def test_own_configs(path):
    config = engines.read(path)
    assert path.stem.removesuffix("_cpu") == config["backend"]
    assert config["environment"]["LMCACHE_CONFIG_FILE"] == f"config/{config['backend']}_backend_config.yaml"


def test_settings_are_those_the_engines_see():
    assert engines._lmcache({"LMCACHE_CHUNK_SIZE": "64"})["chunk_size"] == 64


@pytest.mark.parametrize("arguments", [["bench"], ["bench", "--engine", "http://a"], ["bench", "x", "--tokens", "1k"]])
def test_bad_arguments(arguments):
    assert isinstance(CliRunner().invoke(app, arguments).exception, UserError)


def test_nobody_there():
    with pytest.raises(UserError, match="is no vLLM server"):
        run.of_urls(["http://127.0.0.1:9", "http://127.0.0.1:9"], None, Asked([(256, 1)], 0, 1, 1, 0))


@pytest.fixture
def settled(engines, monkeypatch):
    """Each measurement ends when both engines have stored what they computed, not after some seconds."""

    async def sample(*args):
        got = await endpoint.sample(*args)
        for engine in engines:
            await asyncio.to_thread(engine.settle)
        return got

    for module in (run, grpo):
        monkeypatch.setattr(module, "sample", sample)


def test_two_engines(engines, settled):
    """What is counted adds up, a shared hit is all of the whole chunks, and the answers are those of the miss."""
    urls = [engine.url for engine in engines]
    result = run.of_urls(urls, None, Asked([(1024, 2)], n=0, answer=2, repeat=1, settle=0))
    found = {row["case"]: row["samples"][0] for row in result["cases"]}
    assert {case: sample["prompt"] for case, sample in found.items()} == {"miss": 2050, "shared": 2050, "local": 2050}
    assert (found["miss"]["shared"], found["shared"]["shared"], found["local"]["local"]) == (0, 2048, 2048)
    assert max(sample["logprob_difference"] for sample in found.values()) < 1e-5
    assert json.loads(json.dumps(result))["kv_bytes_a_token"]


class Events:
    """What an engine sends from now on, as from a receiver of its own."""

    def __init__(self, engine):
        self._events, self._read = engine.events, len(engine.events)

    async def receive(self):
        while self._read == len(self._events):
            await asyncio.sleep(0.01)
        self._read += 1
        return self._events[self._read - 1]


def test_two_samples_of_a_prompt_compute_it_once(engines, settled):
    """On one engine, and with the router, which holds the second until the first is stored: whoever is faster."""
    urls, asked = [engine.url for engine in engines], Asked([(1024, 1)], n=2, answer=2, repeat=1, settle=0)

    async def measure():
        async with endpoint.endpoints(urls) as found:
            for one in found:
                await one.connect()
            return await grpo.patterns(found, Engines({"shared": urls}, list(map(Events, engines)), CHUNK), asked)

    samples = {row["routing"]: row["samples"] for row in asyncio.run(measure())}
    assert {name: [sample["prompt"] for sample in found] for name, found in samples.items()} == {
        "verl": [2050],
        "affinity": [2050],
        "kvshare": [2050],
    }
    assert [samples[name][0]["computed"] for name in ("affinity", "kvshare")] == [1026, 1026]


@pytest.mark.parametrize("text", ["batch:1:2", "talks:1:2:x", "talks:1:2:3:4:5", "other:1:2:3", "batch:0:1:1:1:1"])
def test_bad_workload(text):
    with pytest.raises(UserError, match="batch:PROMPTS"):
        Workload.parse(text)


def test_workloads_are_those_of_their_seed():
    talks = Workload.parse("talks:3:4096:2048:8").conversations(1)
    assert [[prompt for prompt, _, _ in turns] for _, turns in talks] == [[4096 + 2048 * i for i in range(8)]] * 3
    assert Workload.parse("talks:3:4096:2048:8").conversations(1) == talks
    assert {len(turns) for _, turns in Workload.parse("talks:40:4096:2048").conversations(1)} == {2, 3, 4, 5, 6, 7}


def test_working_set_has_a_common_prompt_once():
    assert tokens_of([(0, [(100, 5, 0.0), (200, 6, 0.0)]), (1, [(70, 7, 0.0)]), (1, [(70, 8, 0.0)])]) == 200 + 70 + 21


def test_engines_that_arms_need():
    assert kinds(["verl", "affinity", "kvshare"], 2) == ["plain", "plain", "shared", "shared"]
    assert kinds(["verl", "offloading", "kvshare", "connector"], 1) == ["plain", "offload", "shared"]
    with pytest.raises(UserError, match="--arms 'x' must be of verl"):
        kinds(["verl", "x"], 1)


def test_table_of_rollouts():
    sample = {"makespan": 7.0, "first_p50": 0.3, "first_p95": 0.6, "computed": 100, "prompt": 200, "of_pool": 2}
    row = {
        "rollout": "talks:40:4096:2048",
        "arm": "kvshare",
        "samples": [sample, sample | {"makespan": 8.0, "moved": 6}],
    }
    line = tables.rollouts([row]).splitlines()[-1]
    assert line == (
        "| talks:40:4096:2048 | 2.0 | kvshare | 7.50 (7.00–8.00) | 0.30 (0.30–0.30) | 0.60 (0.60–0.60) | 50% | 3 |"
    )


def test_rollouts_on_two_engines(engines):
    """Each arm is sent the same rollout, and computes each prompt once or twice."""
    pair = Engines({"shared": [engine.url for engine in engines]}, None, 256)
    workloads, saved = [Workload.parse("batch:2:2:600:8:16"), Workload.parse("talks:1:300:100")], []
    rows = asyncio.run(measure(pair, workloads, ["connector", "kvshare"], repeat=1, save=saved.append))
    assert [(row["arm"], len(row["samples"])) for row in rows] == [("connector", 1), ("kvshare", 1)] * 2
    assert saved[-1] == rows
    for row in rows[:2]:
        assert row["samples"][0]["prompt"] == 4 * 601
        assert 2 * 601 <= row["samples"][0]["computed"] + row["samples"][0]["shared"] <= 4 * 601
        assert row["samples"][0]["of_pool"] > 0


def test_no_further_round_begins_after_the_limit(engines):
    pair = Engines({"shared": [engine.url for engine in engines]}, None, 256)
    (row,) = asyncio.run(measure(pair, [Workload.parse("batch:1:1:64:4:4")], ["connector"], repeat=9, until=0))
    assert len(row["samples"]) == 1
