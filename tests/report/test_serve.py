"""Claims about `headwater serve`: the numbers of the scores, a case at a time, for browsers of this machine alone."""

import http.client
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from urllib.parse import quote, urlencode

import numpy as np
import pandas
import pytest
import torch

import headwater as hw
from headwater.errors import InvalidSetting, NotSaved
from headwater.job.served import served
from headwater.report import Known, server
from headwater.report.live import Live
from headwater.report.server import Server
from headwater.store.matrix import StoredMatrix
from headwater.store.plan import Sizes
from headwater.store.scores import Scores
from headwater.store.tiles import chunk_file
from headwater.torch import TorchBatch, TorchComposableInfluence

ROWS, QUERIES = 50, 7
NAMES = [f"row/{n} & co" for n in range(ROWS)]
LABELS = np.array(list("abc"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A run of 7 x 3 tiles: eight rows, three queries each."""
    torch.manual_seed(0)
    x, y = torch.randn(ROWS, 4), torch.arange(ROWS) % 3
    train = [TorchBatch(x[k : k + 5], y[k : k + 5], ids=NAMES[k : k + 5]) for k in range(0, ROWS, 5)]
    model = torch.nn.Sequential(torch.nn.Linear(4, 5), torch.nn.Tanh(), torch.nn.Linear(5, 3))
    influence = TorchComposableInfluence(model, torch.nn.CrossEntropyLoss(), hw.Ekfac()).fit(train)
    path = tmp_path_factory.mktemp("served") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("headwater.run.attribute.tile_sizes", lambda *_: Sizes(8, 3))
        influence.attribute(train, [(x[:QUERIES] + 0.1, y[:QUERIES])], store=path, by_block=True)
    return path


def known(**more):
    queries = {"label": LABELS[np.arange(QUERIES) % 3], "age": np.arange(QUERIES)}
    rows = pandas.DataFrame({"label": LABELS[np.arange(ROWS) % 3], "age": np.arange(ROWS)}, index=NAMES)
    return Known(rows=rows, queries=queries, predictions=["a"] * QUERIES, **more)


@pytest.fixture
def serving():
    """Starts servers; each ends with its test, and none may have failed in a thread."""
    running = []

    def started(live):
        found = Server(live)
        thread = threading.Thread(target=found.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        running.append((found, thread))
        return found

    yield started
    for found, thread in running:
        found.shutdown()
        thread.join()
        found.server_close()


@pytest.fixture
def live(folder):
    return Live(Scores.open(folder), known())


def ask(at, path, method="GET", token=True, host=None, **headers):
    """Status, headers and content."""
    connection = http.client.HTTPConnection("127.0.0.1", at.server_port, timeout=10)
    connection.putrequest(method, path, skip_host=True)
    for name, value in {"Host": host or f"127.0.0.1:{at.server_port}", **headers}.items():
        connection.putheader(name.replace("_", "-"), value)
    if token:
        connection.putheader("X-Headwater-Token", at.token if token is True else token)
    connection.endheaders()
    answer = connection.getresponse()
    content = answer.read()
    connection.close()
    return answer.status, dict(answer.headers), content


def answer(at, route, /, **fields):
    status, _, content = ask(at, f"/{route}?{urlencode(fields)}")
    found = json.loads(content)
    assert status == 200, found
    return found


def shown(found, end):
    """Ids and scores of one end of a case."""
    pairs = found["queries"][0][end]
    return [found["rows"][row]["id"] for row, _ in pairs], [score for _, score in pairs]


# The numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 5, 100])
def test_a_query_has_the_rows_of_top(k, live, serving, folder):
    at, top = serving(live), Scores.open(folder).top(k)
    for place in range(QUERIES):
        found = answer(at, "query", id=place, k=k)
        assert found["queries"][0]["q"] == str(place) and found["queries"][0]["c"]["l"] == LABELS[place % 3]
        for end, ids, values, sign in (
            ("up", top.helpful_ids[place], top.helpful_scores[place], 1),
            ("down", top.harmful_ids[place], top.harmful_scores[place], -1),
        ):
            right = values * sign > 0
            assert shown(found, end)[0] == ids[right].tolist()
            np.testing.assert_allclose(shown(found, end)[1], values[right], rtol=1e-5)


def test_a_train_row_has_the_queries_of_its_column(live, serving, folder):
    at, scores = serving(live), Scores.open(folder)
    for row in (0, 13, ROWS - 1):
        column = scores.sel(train=NAMES[row]).values[:, 0]
        np.testing.assert_array_equal(scores.column(row), column)
        found = answer(at, "row", id=NAMES[row], k=100)
        order = np.argsort(-column, kind="stable")
        assert shown(found, "up")[0] == [str(q) for q in order if column[q] > 0]
        assert shown(found, "down")[0] == [str(q) for q in order[::-1] if column[q] < 0]
        assert found["queries"][0]["q"] == NAMES[row]


def test_a_case_is_what_a_page_of_all_has_of_it(live, serving, folder, tmp_path):
    rows, queries = live.known.rows, live.known.queries
    page = Scores.open(folder).report(tmp_path / "page.html", rows, queries, predictions=["a"] * QUERIES)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page.read_text(), re.S)[1])
    for place, wanted in enumerate(data["queries"]):
        found = answer(serving(live), "query", at=place, k=5)
        query = found["queries"][0]
        rest = {name: value for name, value in wanted.items() if name not in ("up", "down")}
        assert rest.items() <= query.items()
        for end in ("up", "down"):
            assert [found["rows"][r]["c"]["l"] for r, _ in query[end]] == [
                data["rows"][r]["c"]["l"] for r, _ in wanted[end]
            ]
            assert shown(found, end)[1] == [score for _, score in wanted[end]]


def test_only_the_tiles_of_a_case_are_read(live, serving, monkeypatch):
    read, at, chunk = [], serving(live), StoredMatrix._chunk
    monkeypatch.setattr(StoredMatrix, "_chunk", lambda self, *of: (read.append(of), chunk(self, *of))[1])
    monkeypatch.setattr(StoredMatrix, "read", lambda *_: pytest.fail("the whole matrix was read"))
    ask(at, "/")
    answer(at, "queries", search="a")
    assert read == []
    answer(at, "query", id=4)
    assert sorted(read) == [(number, 1) for number in range(7)]
    answer(at, "query", id=4)
    assert len(read) == 7  # it is kept
    read.clear()
    answer(at, "row", at=17)
    assert read == [(2, 0), (2, 1), (2, 2)]


def test_queries_are_listed_in_pieces_and_found(live, serving):
    at = serving(live)
    found = answer(at, "queries", **{"from": 2, "count": 3})
    assert [q["q"] for q in found["queries"]] == ["2", "3", "4"] and found["count"] == QUERIES
    assert [q["q"] for q in answer(at, "queries", search="label B")["queries"]] == ["1", "4"]
    assert [q["q"] for q in answer(at, "queries", wrong=1)["queries"]] == ["1", "2", "4", "5"]
    assert answer(at, "queries", search="nothing like it")["queries"] == []
    # "5" is in none but its own id and age; the one that is called so comes first.
    assert answer(at, "queries", search="5")["queries"][0]["q"] == "5"
    assert answer(at, "queries", **{"from": 10**9})["queries"] == []


def test_ids_of_any_kind_are_found_as_they_are_printed():
    values = np.random.default_rng(0).normal(size=(4, 3))
    ids = [np.array(["..", "a/b", "\u202e?&#", "x" * 600]), np.array([-1.5, 2.0, 1e7, 4.0]), np.arange(4) == 1]
    for names in ids[:2]:
        live = Live(Scores(values, names, np.array([-3, 7, 11])), Known())
        for place, name in enumerate(names.tolist()):
            assert live.place_of("query", str(name)) == place
        listed = live.queries()["queries"]
        assert [query["at"] for query in listed] == [0, 1, 2, 3]
        for query, name in zip(listed, names.tolist(), strict=True):
            assert query.get("o", query["q"]) in (str(name), None)
        assert live.place_of("row", "-3") == 0
        assert all("\u202e" not in query["q"] for query in listed)


def test_two_ask_at_once_and_both_are_answered(live, serving):
    at, found, began = serving(live), {}, threading.Barrier(2)

    def client(place):
        began.wait()
        found[place] = [answer(at, "query", at=q, k=3)["queries"][0]["at"] for q in (place, 5 - place, place)]

    threads = [threading.Thread(target=client, args=(place,)) for place in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {0: [0, 5, 0], 1: [1, 4, 1]}


def test_nothing_is_read_for_who_has_gone(live, serving, monkeypatch):
    read, at = [], serving(live)
    monkeypatch.setattr(StoredMatrix, "_chunk", lambda self, *of: read.append(of))
    with at.turn, socket.create_connection(("127.0.0.1", at.server_port), timeout=5) as connection:
        asked = f"GET /query?id=1&token={at.token} HTTP/1.0\r\nHost: localhost:{at.server_port}\r\n\r\n"
        connection.sendall(asked.encode())
        while at.waiting:  # until it is the question's turn
            time.sleep(0.01)
    assert answer(at, "queries")["count"] == QUERIES and read == []


# What goes wrong ------------------------------------------------------------------------------------------------------


def test_a_damaged_tile_is_named_and_the_server_lives_on(folder, serving, tmp_path):
    shutil.copytree(folder, tmp_path / "run")
    at = serving(Live(Scores.open(tmp_path / "run"), known()))
    chunk = chunk_file(tmp_path / "run", 3, 1, 3)
    content = bytearray(chunk.read_bytes())
    content[7] ^= 1
    chunk.write_bytes(content)
    status, _, said = ask(at, "/query?id=4")
    assert status == 500 and chunk.name in json.loads(said)["error"] and "damaged" in json.loads(said)["error"]
    assert answer(at, "query", id=0)["queries"][0]["q"] == "0"
    chunk.unlink()
    status, _, said = ask(at, "/query?id=4")
    assert status == 500 and "missing" in json.loads(said)["error"]


def test_what_a_users_function_raises_is_said(serving, capsys):
    def rows(_):
        raise SystemExit("my own mistake")

    at = serving(Live(Scores(np.ones((2, 3)), np.arange(2), np.arange(3)), Known(rows=rows)))
    status, _, said = ask(at, "/query?id=0")
    assert status == 500 and "my own mistake" in json.loads(said)["error"] and ask(at, "/")[0] == 200
    assert "Traceback" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "status", "said"),
    [
        ("/query?id=99", 404, "no query"),
        ("/query?at=99", 404, "place 99"),
        ("/row?id=row", 404, "no training row"),
        ("/nothing", 404, "this path"),
        ("/../../../../etc/passwd", 404, "this path"),
        ("/query/../../etc/passwd", 404, "this path"),
        ("/%2e%2e/%2e%2e/etc/passwd", 404, "this path"),
        ("/query?id=../../etc/passwd", 404, "no query"),
        ("http://127.0.0.1/queries", 404, "this path"),
        ("/query?id=" + "9" * 3000, 414, "3010 characters"),
        ("/queries?search=" + "a" * 201, 400, "at most 200"),
        ("/queries?count=201", 400, "1 to 200"),
        ("/queries?count=-1", 400, "1 to 200"),
        ("/queries?from=" + "9" * 13, 400, "from"),
        ("/queries?from=%D9%A3", 400, "from"),
        ("/query?id=1&k=101", 400, "1 to 100"),
        ("/query?id=1&k=0", 400, "1 to 100"),
        ("/query?id=1&id=2", 400, "twice"),
        ("/query?id=%FF", 400, "cannot be read"),
        ("/query?" + "&".join(f"a{k}" for k in range(11)), 400, "cannot be read"),
        ("/query", 400, "one of id and at"),
        ("/query?id=1&at=1", 400, "one of id and at"),
        ("/query?id=1&file=x", 400, "no field 'file'"),
    ],
)
def test_what_cannot_be_asked_is_refused_in_words(path, status, said, live, serving):
    found, headers, content = ask(serving(live), path)
    assert found == status and said in json.loads(content)["error"]
    assert headers["Content-Type"] == "application/json; charset=utf-8"


@pytest.mark.parametrize("path", ["/", "/queries", "/query?id=1", "/row?at=1", "/nothing"])
def test_without_the_token_nothing_is_said(path, live, serving):
    at = serving(live)
    for token in (False, "", "x", at.token + "x", "é"):
        status, _, content = ask(at, path, token=token)
        assert status == 403 and at.token not in content.decode()
    mark = "&" if "?" in path else "?"
    assert ask(at, f"{path}{mark}token={at.token}", token=False)[0] == (404 if path == "/nothing" else 200)
    assert ask(at, f"{path}{mark}token=no", token=False)[0] == 403


@pytest.mark.parametrize("host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "[::1]:{port}"])
def test_another_host_is_refused(host, live, serving):
    at = serving(live)
    status, _, content = ask(at, "/", host=host.format(port=at.server_port))
    assert status == 403 and "no other name" in json.loads(content)["error"]


def test_this_machine_may_be_called_localhost_and_other_origins_are_refused(live, serving):
    at = serving(live)
    assert at.server_address[0] == "127.0.0.1" and at.address.startswith("http://127.0.0.1:")
    assert ask(at, "/", host=f"LOCALHOST:{at.server_port}")[0] == 200
    assert ask(at, "/", Origin=f"http://localhost:{at.server_port}")[0] == 200
    assert ask(at, "/", Origin="http://evil.example")[0] == 403
    assert ask(at, "/", Origin="null")[0] == 403


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "BREW"])
def test_only_reading_is_allowed(method, live, serving):
    status, headers, content = ask(serving(live), "/", method)
    assert status == 405 and headers["Allow"] == "GET, HEAD" and "only reads" in json.loads(content)["error"]


def test_head_has_no_body_and_all_answers_are_safe(live, serving):
    at = serving(live)
    for path in ("/", "/queries", "/nothing"):
        _, headers, content = ask(at, path)
        _, same, nothing = ask(at, path, "HEAD")
        assert nothing == b"" and same["Content-Length"] == headers["Content-Length"] == str(len(content))
        assert headers["X-Content-Type-Options"] == "nosniff" and headers["Cache-Control"] == "no-store"
        assert headers["Referrer-Policy"] == "no-referrer" and "Access-Control-Allow-Origin" not in headers
        policy = headers["Content-Security-Policy"]
        assert policy.startswith("default-src 'none'") and "frame-ancestors 'none'" in policy and "unsafe" not in policy


@pytest.mark.parametrize(
    "said", [b"nonsense\r\n\r\n", b"GET /\r\n\r\n", b"GET / HTTP/9.9\r\n\r\n", b"\x00\xff\r\n\r\n", b""]
)
def test_what_is_no_question_does_no_harm(said, live, serving):
    at = serving(live)
    with socket.create_connection(("127.0.0.1", at.server_port), timeout=5) as connection:
        connection.sendall(said)
        connection.shutdown(socket.SHUT_WR)
        assert at.token.encode() not in connection.recv(10_000)
    assert ask(at, "/")[0] == 200


def test_who_says_nothing_or_little_is_left(live, serving, monkeypatch):
    monkeypatch.setattr(server, "PATIENCE", 0.05)
    at = serving(live)
    with socket.create_connection(("127.0.0.1", at.server_port), timeout=5) as connection:
        connection.sendall(b"GET / HT")
        assert connection.recv(100) == b""  # ended by the server
    assert ask(at, "/")[0] == 200


def test_too_many_at_once_are_told_to_come_again(live, serving):
    at = serving(live)
    held = [socket.create_connection(("127.0.0.1", at.server_port), timeout=5) for _ in range(server.AT_ONCE + 1)]
    assert held[-1].recv(100).startswith(b"HTTP/1.0 503")
    for connection in held:
        connection.close()


# What is served -------------------------------------------------------------------------------------------------------


def test_the_page_has_its_token_and_no_scores(live, serving):
    at = serving(live)
    text = ask(at, "/")[2].decode()
    assert json.loads(re.search(r'id="data">(.*?)</script>', text, re.S)[1]) == {"token": at.token}
    assert "connect-src &#39;self&#39;" in text and "What to trust" in text and "7 queries, 50 training rows" in text
    assert not re.search(r"https?://|@import|<iframe|\son\w+=|\sstyle=|url\(", text)


def test_folders_of_runs_and_of_saved_scores_are_served(folder, tmp_path):
    scores = Scores.open(folder)
    Scores(scores.values, scores.query_ids, scores.train_ids).save(tmp_path / "saved")
    for place in (folder, tmp_path / "saved"):
        found = served(str(place), 3).query(1, 3)
        assert shown(found, "up")[0] == scores.top(3).helpful_ids[1].tolist()


JOB = """
import numpy as np
from sklearn.linear_model import LogisticRegression
import headwater as hw
from headwater.sklearn import SklearnComposableInfluence

print("ran")
x = np.random.default_rng(0).normal(size=(40, 3))
y = (x[:, 0] > 0).astype(int)

def setup():
    influence = SklearnComposableInfluence(LogisticRegression().fit(x, y), hw.Direct())
    said = ["no", "yes"]
    return {"influence": influence, "train": [(x, y)], "query": [(x[:4] + 0.1, y[:4])], "predictions": y[:4] + 10,
            "queries": lambda name: f"question {name}"}
"""


def test_a_job_and_its_results_are_served(tmp_path, monkeypatch, capsys):
    from headwater.job import Call, Job

    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(JOB)
    (tmp_path / "job.toml").write_text('setup = "mine.py"\n[report]\nk = 2\ntitle = "Mine"\n')
    with pytest.raises(NotSaved, match=r"headwater score job\.toml"):
        served("job.toml")
    assert "ran" not in capsys.readouterr().out  # nothing of the user's for nothing
    scores = Call(Job.read("job.toml")).score()
    found = served("job.toml").query(1, 2)
    assert found["queries"][0]["c"]["t"] == "question 1" and found["queries"][0]["p"] in ("10", "11")
    assert found["rows"][0]["c"]["c"]  # the list of batches says what rows are
    capsys.readouterr()
    by_folder = served("results")
    assert "ran" not in capsys.readouterr().out and by_folder.known.title == "Mine" and by_folder.known.k == 2
    assert shown(by_folder.query(1, 2), "up") == shown(found, "up")
    assert shown(found, "up")[0] == [str(i) for i in scores.top(2).helpful_ids[1]]


def test_what_cannot_be_served_is_refused(tmp_path):
    with pytest.raises(NotSaved, match="expected a job file, or a folder"):
        served(str(tmp_path / "nothing"))
    with pytest.raises(NotSaved, match="no scores at"):
        served(str(tmp_path))
    with pytest.raises(InvalidSetting, match="no ranking"):
        Live(Scores(np.zeros((2, 3, 4)), np.arange(2), np.arange(3), mode="perturbation"), Known())
    live = Live(Scores(np.ones((2, 3)), np.arange(2), np.arange(3)), Known())
    with Server(live) as one, pytest.raises(InvalidSetting, match=f"port {one.server_port}"):
        Server(live, one.server_port)


@contextmanager
def ended(process):
    """Whatever happens in the block: a test that fails must not wait for a server."""
    try:
        yield
    finally:
        process.kill()


def test_the_command_says_where_it_listens_and_ends_at_ctrl_c(folder):
    # Ctrl-C is heard also where what started the tests ignores it (a script's job in the background does).
    heard = "import runpy, signal; signal.signal(signal.SIGINT, signal.default_int_handler); runpy.run_module"
    command = [sys.executable, "-c", f"{heard}('headwater', run_name='__main__')", "serve", str(folder), "--k", "2"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen(command, **pipes) as process, ended(process):
        line = process.stdout.readline()
        port, token = re.search(r"http://127\.0\.0\.1:(\d+)/\?token=(\S+) ", line).groups()
        connection = http.client.HTTPConnection("127.0.0.1", int(port), timeout=10)
        connection.request("GET", f"/row?token={token}&id={quote(NAMES[3])}")
        assert connection.getresponse().status == 200
        os.kill(process.pid, signal.SIGINT)
        out, err = process.communicate(timeout=20)
    assert process.returncode == 130 and out == "" and err == "headwater: interrupted.\n" and "Ctrl-C" in line
