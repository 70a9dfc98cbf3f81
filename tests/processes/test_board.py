"""The notice board, on real stores, between threads and between processes."""

import contextlib
import gc
import itertools
import os
import queue
import resource
import signal
import socket
import threading
import time

import pytest
import torch.distributed as dist
from harness import NONE, PATIENCE, wait_until

from autoteardown.channel import board as boards
from autoteardown.channel import stores
from autoteardown.channel.board import Board
from autoteardown.channel.relay import Relay

# Each connection of a TCPStore makes two reverse DNS look-ups; a lost packet costs 5 s of its server's only thread.
os.environ.setdefault("RES_OPTIONS", "timeout:1 attempts:5")

ORIGIN = {"rank": 1, "host": "node-b", "pid": 4711}


class PythonStore(dist.Store):
    """The least that a store written in Python can be: no compare_set, no append."""

    def __init__(self):
        super().__init__()
        self.values, self.lock, self.checks = {}, threading.Lock(), []

    def set(self, key, value):
        with self.lock:
            self.values[key] = value.encode() if isinstance(value, str) else bytes(value)

    def get(self, key):
        return self.values[key]

    def add(self, key, amount):
        with self.lock:
            total = int(self.values.get(key, b"0")) + amount
            self.values[key] = str(total).encode()
        return total

    def check(self, keys):
        self.checks.append(keys)
        return all(key in self.values for key in keys)


class Group:
    """A world of watched boards in this process: one thread a rank."""

    def __init__(self, make_store, world, prefixes=("default_pg", "0/")):
        self.world, self.prefixes, self.make_store = world, prefixes, make_store
        self.stores, self.boards, self.heard, self.threads = {}, {}, {}, {}

    def join(self, *ranks):
        for rank in ranks or range(self.world):
            store = self.make_store()
            for prefix in self.prefixes:
                store = dist.PrefixStore(prefix, store)
            self.stores[rank] = store
            problems = []
            board = self.boards[rank] = Board.open(store, rank, self.world, problems.append)
            assert board is not None, problems
            heard = self.heard[rank] = queue.SimpleQueue()
            thread = threading.Thread(target=board.watch, args=(lambda *said, heard=heard: heard.put(said),))
            thread.daemon = True
            self.threads[rank] = thread
            thread.start()
        for rank in ranks or range(self.world):
            wait_until(lambda rank=rank: self.boards[rank]._prefix, "the board")
        return self

    def hears(self, *expected, ranks=None):
        """All ranks hear exactly this next; returns what was said with it, by rank."""
        ranks = self.boards if ranks is None else ranks
        said = {rank: [self.heard[rank].get(timeout=PATIENCE) for _ in expected] for rank in ranks}
        for each in said.values():
            assert [kind for kind, _ in each] == [kind.partition("=")[0] for kind in expected], said
        return {rank: [value for _, value in each] for rank, each in said.items()}

    def post(self, name, *args, ranks=None):
        """All ranks post, at once."""
        ranks = list(self.boards if ranks is None else ranks)
        start = threading.Barrier(len(ranks))

        def run(rank):
            values = [arg(rank) if callable(arg) else arg for arg in args]
            start.wait()
            getattr(self.boards[rank], name)(*values)

        threads = [threading.Thread(target=run, args=(rank,), daemon=True) for rank in ranks]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(PATIENCE)
            assert not thread.is_alive(), f"{name} does not come back"

    def close(self):
        for board in self.boards.values():
            board.close()
        for rank, thread in self.threads.items():
            thread.join(PATIENCE)
            assert not thread.is_alive(), f"the watcher of rank {rank} is stuck"


def one_value(said):
    """What all ranks heard, which must be one thing."""
    values = list(said.values())
    assert all(value == values[0] for value in values), said
    return values[0][0]


def tcp_server(libuv=True):
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, use_libuv=libuv)


def tcp_client(server):
    return dist.TCPStore(server.host, server.port, is_master=False, wait_for_workers=False)


@pytest.fixture(params=["libuv", "legacy", "hash", "file", "python"])
def make_store(request, tmp_path, monkeypatch):
    """What each rank of a group makes its store with."""
    monkeypatch.setattr(stores, "_IDLE_POLL", 0.02)
    if request.param in ("libuv", "legacy"):
        server = tcp_server(request.param == "libuv")
        return lambda: tcp_client(server)
    if request.param == "file":
        return lambda: dist.FileStore(str(tmp_path / "store"), -1)
    store = dist.HashStore() if request.param == "hash" else PythonStore()
    return lambda: store


@pytest.fixture
def group(make_store):
    group = Group(make_store, 4)
    yield group
    group.close()


@pytest.fixture
def tcp_group():
    server = tcp_server()
    groups = []

    def make(world=4, server=server, **options):
        groups.append(Group(lambda: tcp_client(server), world, **options))
        return groups[-1]

    yield make
    for each in groups:
        each.close()


# -- what the messages mean, on every store --------------------------------------------------------------------


def test_from_notice_to_quiet(group):
    group.join()
    group.boards[1].tell(ORIGIN)
    assert one_value(group.hears("notice")) == ORIGIN
    group.post("answer", lambda rank: 100 + rank)
    assert one_value(group.hears("plan")) == 104
    group.post("arrived")
    group.post("quiet", True)
    assert one_value(group.hears("quiet")) is True  # and no `halt`: every rank steps


def test_two_evicted_ranks_make_one_notice(group):
    group.join()
    group.post("tell", lambda rank: {"rank": rank}, ranks=(0, 3))
    assert one_value(group.hears("notice"))["rank"] in (0, 3)


def test_last_answer_and_timeout_make_one_plan(group):
    group.join()
    group.boards[0].tell(ORIGIN)
    group.post("answer", 7, ranks=(0, 1, 2))
    start = threading.Barrier(2)

    def give_up():
        start.wait()
        group.boards[0].plan_now()

    thread = threading.Thread(target=give_up, daemon=True)
    thread.start()
    start.wait()
    group.boards[3].answer(7)
    thread.join(PATIENCE)
    assert [said[1] for said in group.hears("notice", "plan").values()] in ([8] * 4, [None] * 4)


@pytest.mark.parametrize(
    ("answers", "plan"),
    [
        ([(5,), (9,), (None,), (8,)], 10),
        ([(0,), (0,), (0,), (0,)], 1),
        ([(5,), (9,), (8, True), (8,)], None),
        ([(None,), (None,), (None,), (None,)], None),
    ],
    ids=["a rank that never steps", "nobody has stepped yet", "a rank that cannot", "nobody steps"],
)
def test_plan(group, answers, plan):
    group.join()
    group.boards[2].tell(ORIGIN)
    for rank, answer in enumerate(answers):
        group.boards[rank].answer(*answer)
    assert {said[1] for said in group.hears("notice", "plan").values()} == {plan}


@pytest.mark.parametrize("plan", ["", "\xff", "stop", "stop:x:2", "stop:1:2:3", "later"])
def test_a_plan_that_makes_no_sense_means_now(group, plan):
    """And the board goes on: a rank that lost it here could be gone before all have heard the notice."""
    group.join()
    group.boards[0]._line.store().set(f"{group.boards[0]._prefix}plan", plan)
    group.boards[1].tell(ORIGIN)
    assert group.hears("notice", "plan") == {rank: [ORIGIN, None] for rank in range(4)}
    group.post("quiet", True)
    assert one_value(group.hears("quiet"))


def test_last_to_arrive_halts_the_ranks_that_do_not_step(group):
    group.join()
    group.boards[0].tell(ORIGIN)
    group.post("answer", lambda rank: rank or None)
    assert group.hears("notice", "plan")[0][1] == 4
    group.post("arrived", ranks=(1, 2))
    assert group.heard[0].empty()
    group.post("arrived", ranks=(3,))
    group.hears("halt")
    group.post("quiet", True)
    group.hears("quiet")


def test_halt_before_there_is_a_plan(group):
    group.join()
    group.boards[0].tell(ORIGIN)
    group.boards[0].answer(3)
    group.boards[0].halt()
    assert one_value(group.hears("notice", "plan", "halt")) == ORIGIN
    group.boards[1].answer(3)
    group.post("quiet", True)
    assert one_value(group.hears("quiet")) is True


def test_one_wedged_rank_makes_the_group_dirty(group):
    group.join()
    group.boards[0].tell(ORIGIN)
    group.boards[0].plan_now()
    group.post("quiet", lambda rank: rank != 2)
    assert {said[2] for said in group.hears("notice", "plan", "quiet").values()} == {False}


def test_quiet_is_heard_without_a_plan(group):
    group.join()
    group.boards[0].tell(ORIGIN)
    group.post("quiet", True)
    assert group.hears("notice", "plan", "quiet")[3][2] is True


def test_late_rank_hears_what_was_said_first(group):
    group.join(0, 1, 2)
    group.boards[1].tell(ORIGIN)
    group.hears("notice")
    group.boards[2].tell({"rank": 2})
    group.boards[0].plan_now()
    group.hears("plan")
    group.boards[0].answer(1)
    group.boards[1].answer(1)
    group.boards[2].answer(1)
    group.join(3)
    group.boards[3].answer(1)
    assert group.hears("notice", "plan", ranks=[3]) == {3: [ORIGIN, None]}


def test_posts_count_once(group):
    group.join()
    group.boards[0].tell(ORIGIN)
    for _ in range(4):
        group.boards[0].answer(1)
        group.boards[0].quiet(True)
    group.hears("notice")
    group.post("answer", 5, ranks=(1, 2, 3))
    assert one_value(group.hears("plan")) == 6


def test_close_wakes_a_watcher_without_a_word(group):
    group.join()
    group.close()
    assert all(heard.empty() for heard in group.heard.values())
    group.post("tell", ORIGIN)  # neither raises nor blocks


# -- whose notice is it? ---------------------------------------------------------------------------------------


def test_groups_that_share_a_store_do_not_hear_each_other(tcp_group):
    one = tcp_group(2, prefixes=("job-1", "default_pg")).join()
    two = tcp_group(2, prefixes=("job-2", "default_pg")).join()
    one.boards[0].tell({**ORIGIN, "pid": 1})
    two.boards[0].tell({**ORIGIN, "pid": 2})
    assert one_value(one.hears("notice")) == {**ORIGIN, "pid": 1}
    assert one_value(two.hears("notice")) == {**ORIGIN, "pid": 2}


@pytest.fixture(params=[False, True], ids=["pushed", "polled"])
def outliving_store(request, monkeypatch):
    """A store that is there before and after the group."""
    monkeypatch.setattr(stores, "_IDLE_POLL", 0.02)
    if request.param:
        store = dist.HashStore()
        return lambda: store
    server = tcp_server()
    return lambda: tcp_client(server)


def test_restarted_group_does_not_hear_the_last_ones_notice(outliving_store, monkeypatch):
    for generation in range(3):
        monkeypatch.setattr(boards, "_PROCESS", f"process of generation {generation}")
        group = Group(outliving_store, 2).join()
        group.boards[1].tell({**ORIGIN, "pid": generation})
        assert one_value(group.hears("notice")) == {**ORIGIN, "pid": generation}
        group.post("answer", generation)
        assert one_value(group.hears("plan")) == generation + 1
        group.close()


def test_restart_without_a_notice_keeps_ranks_together(outliving_store, monkeypatch):
    monkeypatch.setattr(boards, "_PROCESS", "before")
    Group(outliving_store, 2).join(0).close()  # rank 1 died before it had a board
    monkeypatch.setattr(boards, "_PROCESS", "after")
    group = Group(outliving_store, 2).join()
    group.boards[0].tell(ORIGIN)
    assert one_value(group.hears("notice")) == ORIGIN
    group.close()


def test_second_init_of_the_same_processes(outliving_store):
    Group(outliving_store, 2).join().close()
    group = Group(outliving_store, 2).join(0)
    group.boards[0].tell(ORIGIN)
    group.join(1)
    assert one_value(group.hears("notice")) == ORIGIN
    group.close()


# -- what it holds, and what it costs --------------------------------------------------------------------------


def test_board_keeps_no_server_alive(tcp_group):
    server = tcp_server()
    address = ("127.0.0.1", server.port)
    group = tcp_group(2)
    group.make_store = [tcp_client(server), server].pop
    del server
    group.join()
    assert [board.is_host for board in group.boards.values()] == [True, True]  # one process
    group.make_store = None
    group.stores.clear()

    def refused():
        gc.collect()
        with socket.socket() as probe:
            return probe.connect_ex(address) != 0

    wait_until(refused, "the server to go away with the application's last reference")
    group.hears("lost")


def test_board_keeps_no_file_alive(tmp_path):
    path = tmp_path / "store"
    group = Group(lambda: dist.FileStore(str(path), 1), 2).join()
    assert path.exists()
    group.stores.clear()
    gc.collect()
    assert not path.exists()
    group.close()


def test_nothing_is_left_after_close(tcp_group):
    def held():
        gc.collect()
        return len(os.listdir("/proc/self/fd")), len(os.listdir("/proc/self/task"))

    server = tcp_server()
    store = dist.PrefixStore("default_pg", tcp_client(server))
    before = held()
    for _ in range(20):
        board = Board.open(store, 0, 2)
        thread = threading.Thread(target=board.watch, args=(lambda *said: None,), daemon=True)
        thread.start()
        board.close()  # at any moment of its life: connecting, enrolling, waiting
        thread.join(PATIENCE)
        assert not thread.is_alive()
        del board, thread
    wait_until(lambda: held() == before, f"{before} descriptors and threads")


def test_idle_board_looks_once_a_second():
    store = PythonStore()
    group = Group(lambda: store, 1, prefixes=())
    group.world = 2
    group.join(0)
    store.checks.clear()
    time.sleep(2.5)
    assert len(store.checks) <= 3
    group.close()


def test_store_operations_are_a_few_a_rank():
    """Twelve a rank from start to end; a few more for whoever tells, hosts, is the last to answer or to be quiet."""
    server = tcp_server()
    world = 32
    counts = dict.fromkeys(range(world), 0)

    def counting(rank):
        class Client(dist.TCPStore):
            pass

        def count(name, cost):
            real = getattr(dist.TCPStore, name)

            def call(self, *args):
                counts[rank] += cost
                return real(self, *args)

            setattr(Client, name, call)

        for name in ("set", "add", "append", "check", "compare_set", "multi_get", "multi_set", "wait"):
            count(name, 1)
        count("get", 2)
        return Client

    group = Group(None, world)
    for rank in range(world):
        relay = Relay(counting(rank), "127.0.0.1", server.port, rank)
        group.boards[rank] = Board(stores.Line(relay, "x", rank == 0), rank, world)
        heard = group.heard[rank] = queue.SimpleQueue()
        group.threads[rank] = threading.Thread(
            target=group.boards[rank].watch, args=(lambda *said, heard=heard: heard.put(said),), daemon=True
        )
        group.threads[rank].start()
    group.boards[1].tell(ORIGIN)
    for rank in range(world):
        group.boards[rank].answer(rank)
    group.hears("notice", "plan")
    group.post("arrived")
    group.post("quiet", True)
    group.hears("quiet")
    group.post("left")
    group.hears("gone", ranks=[0])
    group.close()
    assert sorted(counts.values())[:-5] == [12] * (world - 5), counts
    assert sum(counts.values()) <= 12 * world + 20, counts


# -- when there is no board ------------------------------------------------------------------------------------


def reason_for_none(store, world=2):
    problems = []
    assert Board.open(store, 0, world, problems.append) is None
    (problem,) = problems
    return problem


def test_a_world_of_one_rank_has_no_board():
    assert "one rank" in reason_for_none(dist.HashStore(), world=1)


def test_no_store():
    assert "no store" in reason_for_none(None)
    assert "no store" in reason_for_none(dist.Store())  # what torch gives an MPI group


def test_too_few_file_descriptors_for_the_host(monkeypatch):
    server = tcp_server()
    monkeypatch.setattr(resource, "getrlimit", lambda which: (1024, 4096))
    assert "limit is 1024" in reason_for_none(server, world=300)
    assert Board.open(server, 0, 200) is not None


def test_anything_else_is_a_reason_too():
    assert reason_for_none("not a store")


def test_posts_come_back_if_the_server_was_gone_before_the_board_was_connected():
    server = tcp_server()
    client = tcp_client(server)
    board = Board.open(client, 0, 2)
    del server
    gc.collect()
    heard = queue.SimpleQueue()
    poster = threading.Thread(target=board.tell, args=(ORIGIN,), daemon=True)
    poster.start()
    board.watch(lambda *said: heard.put(said))
    kind, reason = heard.get(timeout=PATIENCE)
    assert kind == "lost" and reason
    poster.join(PATIENCE)
    assert not poster.is_alive()


# -- real processes --------------------------------------------------------------------------------------------

RANK = """
    import atexit, os, sys, time, _thread
    from pathlib import Path
    import torch
    import torch.distributed as dist
    from autoteardown.channel.board import Board, close_all

    folder, options = Path(sys.argv[1]), sys.argv[2:]
    store = None
    if "own" in options:  # hosted by the last rank
        rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
        port = int(os.environ["MASTER_PORT"])
        store = dist.TCPStore("127.0.0.1", port, world, rank == world - 1)
        dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    elif "file" in options:
        dist.init_process_group("gloo", init_method=f"file://{folder}/store",
                                rank=int(os.environ["RANK"]), world_size=int(os.environ["WORLD_SIZE"]))
    else:
        dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()

    def hear(kind, value):
        print("heard", kind, value, flush=True)

    board = Board.open(dist.distributed_c10d._get_default_store(), rank, world, print)
    if "hasty" in options:
        dist.barrier()  # or the first rank to end would break the others' init
    atexit.register(close_all)  # as the agent does
    _thread.start_new_thread(board.watch, (hear,))
    if "hasty" not in options:
        while board._prefix is None:
            time.sleep(0.002)
    print("host" if board.is_host else "guest", "ready", flush=True)

    def asked(what):
        while not (folder / f"{what}{rank}").exists():
            time.sleep(0.002)
        print(what, "done", flush=True)

    if "tell" in options:
        asked("tell")
        board.tell({"rank": rank})
    if "hasty" not in options:
        asked("end")
    if "destroy" in options:
        dist.destroy_process_group()
        board.close()
    if "lastmoment" in options:
        sys.setswitchinterval(1000)  # nobody gets the GIL from the main thread before it is in finalization
        for end in board._line._ends:
            end.send(bytes(64))  # what the relay does when the server goes
    if "post" in options:
        board.tell({"rank": rank})
        board.answer(1)
        board.quiet(True)
        board.left()
    if "_exit" in options:
        os._exit(0)
"""


def ask(job, what, rank):
    (job.folder / f"{what}{rank}").touch()


def start_ranks(job, *options, ranks=3, **env):
    found = job.world(RANK, ranks, job.folder, *options, mode=NONE, **env)
    for rank in found:
        rank.wait_for("ready")
    return found


def silent(ranks):
    for rank in ranks:
        # c10d says this of any connection, when the name server does not answer.
        noise = [line for line in rank.noise if "hostname of the client socket" not in line]
        assert not noise, rank.story()


ORDERS = list(itertools.permutations(range(3)))


@pytest.mark.parametrize(
    ("order", "ending", "libuv"),
    [(order, "return", 1) for order in ORDERS]
    + [(order, ending, 1) for order in (ORDERS[0], ORDERS[-1]) for ending in ("destroy", "_exit")]
    + [(order, "return", 0) for order in (ORDERS[0], ORDERS[-1])],
)
def test_silent_in_every_order_of_exit(job, order, ending, libuv):
    ranks = start_ranks(job, ending, USE_LIBUV=libuv)
    lost = False
    for rank in order:
        ask(job, "end", rank)
        assert ranks[rank].wait() == 0, ranks[rank].story()
        lost = lost or rank == 0
        if lost:
            for other in ranks:
                if other.running:
                    other.wait_for("heard lost")
    silent(ranks)


@pytest.mark.parametrize("victim", [0, 1])
def test_silent_when_a_rank_is_killed(job, victim):
    ranks = start_ranks(job, "post")
    ranks[victim].signal(signal.SIGKILL)
    ranks[victim].wait()
    rest = [rank for rank in ranks if rank is not ranks[victim]]
    if victim == 0:
        for rank in rest:
            rank.wait_for("heard lost .*closed")
    for rank in range(3):
        ask(job, "end", rank)
    assert [rank.wait() for rank in rest] == [0, 0]  # the posts of the living come back too
    silent(rest)


@pytest.mark.parametrize("ending", ["return", "destroy", "_exit"])
def test_silent_when_a_job_ends_at_once(job, ending):
    """The board is still being connected when the server goes."""
    for _ in range(5):
        ranks = start_ranks(job, "hasty", ending)
        assert [rank.wait() for rank in ranks] == [0, 0, 0]
        silent(ranks)


def test_watcher_that_comes_back_in_finalization_is_no_abort(job):
    ranks = start_ranks(job, "lastmoment", ranks=2)
    for rank in (1, 0):
        ask(job, "end", rank)
        assert ranks[rank].wait() == 0, ranks[rank].story()
    silent(ranks)


def test_file_store_is_removed_as_without_us(job):
    ranks = start_ranks(job, "file", "destroy", ranks=2)
    assert (job.folder / "store").exists()
    for rank in range(2):
        ask(job, "end", rank)
    assert [rank.wait() for rank in ranks] == [0, 0]
    silent(ranks)
    assert not (job.folder / "store").exists()


def test_notice_between_processes(job):
    ranks = start_ranks(job, "tell")
    ask(job, "tell", 2)
    for rank in ranks:
        rank.wait_for("heard notice {'rank': 2, ")


def test_host_is_rank_0_of_a_plain_job(job):
    ranks = start_ranks(job)
    assert [rank.stdout.startswith("host") for rank in ranks] == [True, False, False]


def test_host_is_whoever_made_the_store(job):
    ranks = start_ranks(job, "own")
    assert [rank.stdout.startswith("host") for rank in ranks] == [False, False, True]


def test_no_rank_hosts_torchruns_store(job):
    launcher = job.torchrun(RANK, job.folder, ranks=2, mode=NONE)
    wait_until(lambda: launcher.stdout.count("ready") == 2, "two ranks")
    assert "host ready" not in launcher.stdout
    for rank in range(2):
        ask(job, "end", rank)
    assert launcher.wait() == 0
    assert "TCPStore" not in launcher.stderr and "frame #" not in launcher.stderr, launcher.story()


def test_forked_child_leaves_its_parents_board_alone(tcp_group):
    group = tcp_group(2).join()
    pid = os.fork()
    if pid == 0:
        with contextlib.suppress(BaseException):
            for board in group.boards.values():
                board.close()
                board.forget()
        os._exit(0)
    os.waitpid(pid, 0)
    group.boards[0].tell(ORIGIN)
    assert one_value(group.hears("notice")) == ORIGIN
