"""The router itself, in virtual time; with real engines it is in test_training.py and `make routing`."""

import asyncio
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT
from hypothesis import given, settings
from hypothesis import strategies as st

from kvshare.routing.cost_model import UNKNOWN, Pace
from kvshare.routing.listener import RETRY
from kvshare.routing.router import PrefillOnceRouter

sys.path.insert(0, str(ROOT / "benchmarks"))
import virtual_time

CHUNK = 256
RATES = {"prefill": 10_000, "load": 100_000, "delay": 0.01, "step": 0.02, "context": 1e-8, "response": 200, "stall": 1}
FAST = Pace(**RATES)
NEVER = Pace(**RATES | {"prefill": 50_000, "load": 20_000, "delay": 1, "context": 1e-9})
PROMPT = [7] * 1000


class Server:
    """A rollout server whose answers the test decides."""

    def __init__(self, pace=UNKNOWN):
        self.policy, self.pace = "run-1", pace
        self.changed, self.answers = asyncio.Event(), {}
        self.dies, self.fails, self.images = False, 0, []

    async def wait_image_placeholders(self):
        return self.images

    async def wait_policy_change(self, known):
        if self.fails:
            self.fails -= 1
            raise RuntimeError("no answer")
        while self.policy == known:
            changed = self.changed
            await changed.wait()
        return self.policy, self.pace

    def update(self, policy):
        self.policy, changed, self.changed = policy, self.changed, asyncio.Event()
        changed.set()

    async def wait_prefix_stored(self, policy, prefix, seconds):
        if self.dies:
            raise RuntimeError("the actor died")
        answer = self.answers.setdefault(prefix, asyncio.get_running_loop().create_future())
        done, _ = await asyncio.wait([answer], timeout=seconds)
        return bool(done) and answer.result(), self.pace

    def answer(self, stored):
        for answer in self.answers.values():
            if not answer.done():
                answer.set_result(stored)

    def __getattribute__(self, name):
        name = {"image_placeholders": "wait_image_placeholders"}.get(name, name)
        found = object.__getattribute__(self, name)
        return SimpleNamespace(remote=found) if name.startswith("wait_") else found


USUAL = 8  # requests a server


def scenario(test, servers=2, pace=UNKNOWN, **config):
    """Run ``test(router, servers)`` in virtual time, in a job where servers had ``USUAL`` requests at once before."""

    async def run():
        made = {str(i): Server(pace) for i in range(servers)}
        router = PrefillOnceRouter(dict(made), {"chunk_size": CHUNK, **config})
        router._most["earlier"] = USUAL * servers
        return await test(router, made)

    return virtual_time.run(run())


async def arrive(router, *names, prompt=PROMPT):
    tasks = {name: asyncio.ensure_future(router.acquire_server(name, prompt)) for name in names}
    await asyncio.sleep(0.001)
    return tasks


def busy(router, name, requests=200):
    """Give a server so many requests that those with a prompt it has move to another one."""
    router._state[name].requests += requests
    router._state[name].context += requests * len(PROMPT)


async def held(router, *names, prompt=PROMPT):
    """A leader, and requests that move as soon as its prefix is stored."""
    leader = await arrive(router, "leader", prompt=prompt)
    busy(router, leader["leader"].result()[0])
    return leader | await arrive(router, *names, prompt=prompt)


def gone(tasks):
    return sorted(name for name, task in tasks.items() if task.done())


def test_followers_go_to_the_leaders_server_at_once():
    async def test(router, servers):
        tasks = await arrive(router, *"abcd")
        assert gone(tasks) == list("abcd")
        assert len({task.result()[0] for task in tasks.values()}) == 1
        other = await arrive(router, "e", prompt=[8] * 1000)
        assert other["e"].result()[0] != tasks["a"].result()[0]
        status = router.get_status()
        assert (status["leaders"], status["stayed"], status["moved"], status["held"]) == (2, 3, 0, 0)

    scenario(test, pace=FAST)


def test_followers_that_move_wait_for_the_prefix():
    async def test(router, servers):
        tasks = await held(router, *"abc")
        assert gone(tasks) == ["leader"]
        leader = tasks["leader"].result()[0]
        servers[leader].answer(True)
        await asyncio.sleep(0.001)
        assert {tasks[name].result()[0] for name in "abc"} == {"0", "1"} - {leader}
        assert gone(await arrive(router, "d")) == ["d"]  # it is stored already
        status = router.get_status()
        assert (status["leaders"], status["held"], status["moved"], status["gave_up"]) == (1, 3, 1, 0)
        assert status["saved_seconds"] > status["move_seconds"] > 0

    scenario(test, pace=FAST)


def test_spread_sends_samples_to_all_servers_whatever_a_move_costs():
    async def test(router, servers):
        tasks = await arrive(router, *"abcd")
        assert gone(tasks) == ["a"]
        servers[tasks["a"].result()[0]].answer(True)
        placed = [(await task)[0] for task in tasks.values()]
        assert sorted(map(placed.count, "01")) == [2, 2]
        assert router.get_status()["held"] == 3
        name = placed[0]
        for server in "01":  # which then have the same load
            router.release_server(server, "abcd"[placed.index(server)])
        turn = await arrive(router, "a", prompt=PROMPT * 2)
        assert turn["a"].result()[0] == name
        turn = await arrive(router, "a", prompt=PROMPT * 3)
        servers[name].answer(True)
        assert (await turn["a"])[0] != name

    scenario(test, pace=NEVER, placement="spread")


def test_who_waited_is_placed_by_what_is_true_then():
    async def test(router, servers):
        tasks = await held(router, "a")
        leader = tasks["leader"].result()[0]
        busy(router, *({"0", "1"} - {leader}), requests=400)
        servers[leader].answer(True)
        assert (await tasks["a"])[0] == leader
        assert router.get_status()["moved"] == 0

    scenario(test, pace=FAST)


def test_a_short_common_beginning_holds_nobody():
    """Its computing takes 7 ms, and the whole prompt that the leader computes 217 ms."""

    async def test(router, servers):
        for i in range(64):
            await arrive(router, str(i), prompt=[1] * CHUNK + [i + 2] * 8192)
        status = router.get_status()
        assert (status["leaders"], status["held"]) == (64, 0)

    scenario(test, pace=Pace(**RATES | {"prefill": 39_000, "load": 500_000, "delay": 0.02, "context": 2e-8}))


@pytest.mark.parametrize("event", ["not stored", "dies", "removed", "updated", "released", "hangs"])
def test_followers_go_when_the_leader_comes_to_nothing(event):
    async def test(router, servers):
        for server in servers.values():
            server.dies = event == "dies"
        tasks = await held(router, *"abcd")
        name = tasks["leader"].result()[0]
        if event == "not stored":
            servers[name].answer(False)
        elif event == "removed":
            router.remove_servers([name])
        elif event == "updated":
            for server in servers.values():
                server.update("run-2")
        elif event == "released":
            router.release_server(name, "leader")
            await asyncio.sleep(1)
        elif event == "hangs":
            await asyncio.sleep(5)
        await asyncio.sleep(0.01)
        assert gone(tasks) == [*"abcd", "leader"]
        assert (router.get_status()["gave_up"] > 0) == (event == "hangs")

    scenario(test, hold_seconds=5)


def test_another_policy_is_led_again():
    async def test(router, servers):
        tasks = await arrive(router, "a")
        servers[tasks["a"].result()[0]].answer(True)
        await asyncio.sleep(0.001)
        for server in servers.values():
            server.update("run-2")
            server.answers.clear()
        await asyncio.sleep(0.001)
        await arrive(router, *"bc")
        assert router.get_status()["leaders"] == 2

    scenario(test)


def test_a_larger_rollout_counts_no_longer_after_some_updates():
    async def test(router, servers):
        usual = []
        for number in range(2, 6):
            for server in servers.values():
                server.update(f"run-{number}")
            await asyncio.sleep(0.001)
            name, _ = await router.acquire_server(str(number), PROMPT)
            router.release_server(name, str(number))
            usual.append(router._options("next", len(PROMPT), [])[0].usual)
        assert usual == [USUAL - 1] * 3 + [1 / 2 - 1]

    scenario(test)


def test_requests_wait_while_all_weights_change_and_then_share():
    """verl's servers would not take them before. Its async trainers send those again that an update has aborted."""

    async def test(router, servers):
        await arrive(router, "first", prompt=[8] * 1000)
        for server in servers.values():
            server.update(None)
        tasks = await arrive(router, *"abcd")
        assert gone(tasks) == []
        servers["1"].update("run-2")
        await asyncio.sleep(0.001)
        assert {task.result()[0] for task in tasks.values()} == {"1"}
        assert router.get_status()["leaders"] == 2

    scenario(test, pace=FAST)


def test_weights_that_change_for_long_hold_nobody_forever():
    """Then a conversation stays where it was, and so do others of its prompt."""

    async def test(router, servers):
        before = await arrive(router, *"abcd")
        busy(router, before["a"].result()[0])
        for server in servers.values():
            server.update(None)
        tasks = await arrive(router, *"abcd")
        await asyncio.sleep(6)
        assert gone(tasks) == list("abcd")
        assert {task.result()[0] for task in tasks.values()} == {before["a"].result()[0]}
        assert router.get_status()["leaders"] == 1

    scenario(test, hold_seconds=5)


@pytest.mark.parametrize("placement", ["cost", "spread"])
def test_replicas_at_different_versions_lead_for_themselves(placement):
    async def test(router, servers):
        await arrive(router, "first", prompt=[8] * 1000)
        servers["1"].update("run-2")
        await asyncio.sleep(0.001)
        led = {}
        for name in "abcd":
            placed = (await arrive(router, name))[name]
            if placed.done():
                led.setdefault(placed.result()[0], name)
                busy(router, placed.result()[0])
        assert sorted(led) == ["0", "1"]
        assert router.get_status()["leaders"] == 3
        servers["0"].answer(True)  # whoever waits for it goes, also to the other version
        await asyncio.sleep(0.001)
        assert {leader.server for leader in router._chunks._leaders} == {"1"}

    scenario(test, pace=FAST, placement=placement)


def test_replica_that_updates_while_it_leads():
    """What it computes from then on is of no version, and nobody waits for it."""

    async def test(router, servers):
        tasks = await held(router, *"abc")
        name = tasks["leader"].result()[0]
        servers[name].update(None)
        await asyncio.sleep(0.001)
        assert {tasks[follower].result()[0] for follower in "abc"} == {"0", "1"} - {name}
        servers[name].update("run-2")
        servers[name].answer(True)
        await asyncio.sleep(0.001)
        again = await arrive(router, "d")
        assert again["d"].result()[0] != name  # the other one has the prompt, of its own version
        assert router.get_status()["leaders"] == 2

    scenario(test, pace=FAST)


@pytest.mark.parametrize(("version", "leaders"), [("run-1", 1), ("run-0", 2)])
def test_replica_that_joins_late(version, leaders):
    """A hybrid one: it loads what replicas of its version have stored, and computes what only others have."""

    async def test(router, servers):
        tasks = await arrive(router, "a")
        servers[tasks["a"].result()[0]].answer(True)
        await asyncio.sleep(0.001)
        servers["2"] = Server(FAST)
        servers["2"].policy = version
        router.add_servers({"2": servers["2"]})
        busy(router, "0")
        busy(router, "1")
        joined = await arrive(router, "b")
        assert joined["b"].result()[0] == "2"
        assert router.get_status()["leaders"] == leaders

    scenario(test, pace=FAST)


def test_conversation_stays_where_its_kv_is_kept(monkeypatch):
    """Across an update, in the mode trajectory: no other server can find it."""

    async def test(router, servers):
        name = (await arrive(router, "a"))["a"].result()[0]
        router.release_server(name, "a")
        busy(router, name, requests=1)
        for server in servers.values():
            server.update("run-2")
        await asyncio.sleep(0.001)
        assert (await arrive(router, "a", prompt=[*PROMPT, 9]))["a"].result()[0] == name

    monkeypatch.setenv("KVSHARE_FRESHNESS", "trajectory")
    scenario(test, pace=FAST)


def test_server_that_says_nothing_holds_nobody_forever():
    async def test(router, servers):
        servers["0"].policy = ""  # what the router has when it has heard nothing
        tasks = await arrive(router, *"ab")
        assert gone(tasks) == []
        await asyncio.sleep(6)
        assert "a" in gone(tasks)

    scenario(test, hold_seconds=5)


def test_shared_examples_are_computed_once():
    """Of different questions after them: the second leads its own rest, on the server that has the examples."""

    async def test(router, servers):
        examples = [1] * 2 * CHUNK
        tasks = await arrive(router, "a", prompt=examples + [2] * CHUNK)
        tasks |= await arrive(router, "b", prompt=examples + [3] * CHUNK)
        assert len({task.result()[0] for task in tasks.values()}) == 1
        assert router.get_status()["leaders"] == 2

    scenario(test, pace=FAST)


@pytest.mark.parametrize(("pace", "tokens", "waits"), [(FAST, 1000, True), (FAST, 100, False), (NEVER, 1000, False)])
def test_nobody_is_held_where_loading_does_not_pay(pace, tokens, waits):
    async def test(router, servers):
        tasks = await held(router, "a", prompt=PROMPT[:tokens])
        assert tasks["a"].done() != waits

    scenario(test, pace=pace)


@pytest.mark.parametrize("tokens", [len(PROMPT), 100])  # as many as a chunk has, and fewer
def test_next_turn_stays_while_there_is_room_and_moves_when_there_is_none(tokens):
    async def test(router, servers):
        prompt = PROMPT[:tokens]
        name, _ = await router.acquire_server("talk", prompt)
        servers[name].answer(True)
        router.release_server(name, "talk")
        busy(router, name, requests=1)
        assert (await router.acquire_server("talk", prompt * 2))[0] == name
        router.release_server(name, "talk")
        busy(router, name)
        moved, _ = await router.acquire_server("talk", prompt * 3)
        assert moved != name
        router.release_server(moved, "talk")
        assert (await router.acquire_server("talk", prompt * 4))[0] == moved  # moving back would cost again

    scenario(test, pace=FAST)


def test_determinism_places_by_request_id():
    async def place(router, servers):
        return [(await router.acquire_server(f"r{i}", PROMPT[:100]))[0] for i in range(50)]

    places = scenario(place, full_determinism=True)
    assert places == scenario(place, full_determinism=True)
    assert set(places) == {"0", "1"}


STORM = st.lists(
    st.tuples(
        st.sampled_from(["arrive", "release", "answer", "fail", "update", "remove", "add", "wait"]), st.integers(0)
    ),
    max_size=60,
)


@settings(max_examples=100)
@given(STORM, st.sampled_from(["cost", "spread"]))
def test_no_request_is_lost_and_loads_return_to_zero(storm, placement):
    async def test(router, servers):
        tasks, spare = {}, {}
        for i, (event, pick) in enumerate(storm):
            if event == "arrive":
                tasks |= await arrive(router, f"r{i}", prompt=[pick % 3] * (CHUNK * (1 + pick % 4)))
            elif event == "release" and (done := gone(tasks)):
                name = done[pick % len(done)]
                router.release_server(tasks.pop(name).result()[0], name)
            elif event in ("answer", "fail"):
                list(servers.values())[pick % 3].answer(event == "answer")
            elif event == "update":
                list(servers.values())[pick % 3].update(f"run-{i}" if pick % 2 else None)
            elif event == "remove" and len(router.get_all_servers()) > 1:
                name = router.get_all_servers()[pick % len(router.get_all_servers())]
                spare[name] = router._servers[name]
                router.remove_servers([name])
            elif event == "add" and spare:
                router.add_servers(dict([spare.popitem()]))
            await asyncio.sleep(pick % 5)
        for name, task in tasks.items():
            router.release_server((await task)[0], name)  # nobody waits forever: virtual time would raise
        assert not router._placed
        assert all(server.requests == server.context == 0 for server in router._state.values())
        assert router.get_total_inflight() == 0

    scenario(test, servers=3, hold_seconds=7, placement=placement)


@pytest.mark.parametrize("silent", [1, 3])
def test_no_request_waits_longer_than_that(silent):
    """Neither for each server that says nothing, nor for them and then for a leader."""

    async def test(router, servers):
        for server in list(servers.values())[-silent:]:
            server.policy = ""  # what the router has when it has heard nothing
        tasks = await arrive(router, *"ab")
        await asyncio.sleep(6)
        assert gone(tasks) == ["a", "b"]

    scenario(test, servers=3, hold_seconds=5)


@pytest.mark.parametrize("ids", [np.array(PROMPT), torch.tensor(PROMPT), np.array([PROMPT]), [np.int64(7)] * 1000])
def test_prompt_in_what_verls_servers_take(ids):
    """Whatever an agent loop's tokenizer returned; verl's own router does not look at it."""

    async def test(router, servers):
        tasks = await held(router, "a", prompt=ids)
        tasks |= await arrive(router, "b", prompt=PROMPT)
        assert gone(tasks) == ["leader"]
        servers[tasks["leader"].result()[0]].answer(True)
        assert await tasks["b"]

    scenario(test, pace=FAST)


def test_two_at_once_under_one_id():
    """As an agent loop's that asks twice at once; each release is of one of them."""

    async def test(router, servers):
        tasks = [asyncio.ensure_future(router.acquire_server("a", PROMPT[:100])) for _ in range(2)]
        for task in tasks:
            router.release_server((await task)[0], "a")
        assert not router._placed
        assert all(server.requests == server.context == 0 for server in router._state.values())

    scenario(test)


def test_server_added_again_is_heard():
    """As verl's trainers add hybrid replicas that may be there already, or came back at the same address."""

    async def test(router, servers):
        await arrive(router, "a")
        router.add_servers({name: router._servers[name] for name in servers})
        await arrive(router, *"bc", prompt=[8] * 1000)
        assert router.get_status()["leaders"] == 2

    scenario(test)


def test_server_that_failed_to_answer_is_heard_again(caplog):
    """While it does not, the others share; the report says which one it is."""

    async def test(router, servers):
        servers["1"].fails = 3
        await arrive(router, "a")
        assert router.get_status()["silent"] == ["1"]
        assert "1 does not report its policy" in caplog.text
        await asyncio.sleep(sum(RETRY[:3]) + 0.1)
        assert router.get_status()["silent"] == []
        assert router._state["1"].policy == "run-1"

    scenario(test)


def test_updates_record_the_counters_of_a_rollout_that_does_not_end(monkeypatch):
    async def test(router, servers):
        recorded = []
        monkeypatch.setattr(router._event_log, "write", lambda op, **fields: recorded.append(fields["leaders"]))
        await arrive(router, "a")
        recorded.clear()  # the servers' first reports
        for server in servers.values():
            server.update("run-2")
        await asyncio.sleep(0.001)
        assert recorded == [1, 1]

    scenario(test)


def test_images_are_no_tokens():
    """Different images behind the same text: only the text before them is the same prompt."""

    async def test(router, servers):
        servers["0"].images = [9]
        text = [7] * 2 * CHUNK
        tasks = await arrive(router, "a", prompt=[*text, *[9] * CHUNK, *[1] * CHUNK])
        tasks |= await arrive(router, "b", prompt=[*text, *[9] * 2 * CHUNK, *[1] * CHUNK])
        assert router.get_status()["leaders"] == 1  # of the text, which both have
        assert len(servers[tasks["a"].result()[0]].answers) == 1

    scenario(test, pace=FAST)
