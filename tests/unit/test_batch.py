"""`vllm-dvlm batch` and `serve` without an engine: arguments, rows, what is done, rows that move from lost workers."""

import asyncio
import base64
import json

import pytest

from vllm_dvlm.batch import rows
from vllm_dvlm.batch.driver import Driver, Limits, Row, Totals, WorkerLost
from vllm_dvlm.batch.ledger import open_ledger
from vllm_dvlm.cli import main
from vllm_dvlm.tools import batch_command as command

FIELDS = frozenset({"messages", "model", "max_tokens", "seed", "vllm_xargs"})


def lines(tmp_path, *texts):
    path = tmp_path / "in.jsonl"
    path.write_text("\n".join(texts) + "\n")
    return path


# -- rows ----------------------------------------------------------------------------------------------------------


def request(tmp_path, row):
    (line,) = rows.read(lines(tmp_path, row if isinstance(row, str) else json.dumps(row)))
    return rows.request_of(line, "model", tmp_path, FIELDS)


def test_a_plain_row_becomes_a_chat_request(tmp_path):
    (tmp_path / "a b.jpg").write_bytes(b"pixels")
    link = "data:image/jpeg;base64," + base64.b64encode(b"pixels").decode()
    paths = ["a b.jpg", f"file://{tmp_path}/a%20b.jpg", link, "https://host/x.png"]
    row = {"id": 7, "images": paths, "question": "why?", "max_tokens": 8, "diffusion_max_steps": 4}
    found = request(tmp_path, row)
    assert (found["custom_id"], found["method"], found["url"]) == ("7", "POST", "/v1/chat/completions")
    parts = found["body"].pop("messages")[0]["content"]
    assert [part["image_url"]["url"] for part in parts[:-1]] == [link, link, link, "https://host/x.png"]
    assert parts[-1] == {"type": "text", "text": "why?"}
    assert found["body"] == {"model": "model", "max_tokens": 8, "vllm_xargs": {"diffusion_max_steps": 4}}


def test_a_row_in_the_batch_format_passes_as_it_is(tmp_path):
    row = {"custom_id": "a", "method": "POST", "url": "/v1/chat/completions", "body": {"model": "m", "messages": []}}
    assert request(tmp_path, row) == row
    del row["custom_id"]
    assert request(tmp_path, row) == row | {"custom_id": "line-1"}


@pytest.mark.parametrize(
    ("row", "text"),
    [
        ("oops", "no JSON"),
        ('{"id": "a", "question": ', "no JSON"),
        ("[1]", "object is wanted, not list"),
        ({"id": [1], "question": "x"}, "the id must be"),
        ({"id": True, "question": "x"}, "the id must be"),
        ({"id": "a"}, '"question" must be a text'),
        ({"question": 3}, '"question" must be a text'),
        ({"question": "x", "image": 3}, '"image" must be'),
        ({"question": "x", "image": "none.png"}, "none.png cannot be read: No such file"),
        ({"question": "x", "image": "http://[bad"}, "cannot be read: "),
        ({"question": "x", "image": "a\0b"}, "cannot be read: "),
        ({"question": "x", "image": "\ud800.png"}, "cannot be read: "),
        ({"question": "x", "vllm_xargs": "y", "prune_method": "redvtp"}, '"vllm_xargs" must be an object'),
        ({"id": "\ud800", "question": "x"}, "holds half a character"),
        ("[" * 100_000, "no JSON"),
        ({"question": "x", "max_token": 3}, "'max_token' is no option"),
        ({"question": "x", "messages": []}, "'messages' is no option"),
    ],
)
def test_bad_rows(tmp_path, row, text):
    with pytest.raises(rows.BadRow, match=text):
        request(tmp_path, row)


def test_lines_are_numbered_as_editors_do(tmp_path):
    found = list(rows.read(lines(tmp_path, '{"id": "a"}', "", "  ", "[", '{"x": 1}')))
    assert [(line.number, line.name) for line in found] == [(1, "a"), (4, "line-4"), (5, "line-5")]


def test_a_line_without_end_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(rows, "MAX_LINE_BYTES", 10)
    with pytest.raises(ValueError, match="line 2 is longer"):
        list(rows.read(lines(tmp_path, "[1]", "[1,2,3,4,5,6]")))


# -- what is done --------------------------------------------------------------------------------------------------


def test_doubled_ids_are_refused_with_both_lines(tmp_path):
    with open_ledger() as ledger, pytest.raises(ValueError, match="lines 1 and 3 have the same id 'line-2'"):
        ledger.scan(lines(tmp_path, '{"id": "line-2"}', "", '{"id": "line-2"}'))


def test_what_is_answered_is_skipped_and_a_torn_line_cut(tmp_path):
    path, out = lines(tmp_path, *(json.dumps({"id": i}) for i in range(5))), tmp_path / "out.jsonl"
    whole = rows.error_line("3", "x") + "\n" + rows.error_line("1", "x") + "\n"
    out.write_text(whole + rows.error_line("2", "x")[:-9])
    with open_ledger() as ledger:
        assert (ledger.scan(path), ledger.resume(out)) == (5, 2)
        assert out.read_text() == whole
        assert [name for name in "01234" if ledger.is_done(name)] == ["1", "3"]
        assert ledger.resume(tmp_path / "none.jsonl") == 0


@pytest.mark.parametrize(
    "text",
    [
        "oops\n",
        '{"id": "0"}\n',
        '{"custom_id": "9"}\n',
        '{"custom_id": "0"}\n{"custom_id": "0"}\n',
        "no line break in it",
        '{"custom_id": "0"}\n{"name": "torn, and not by a batch',
    ],
)
def test_another_files_output_is_not_touched(tmp_path, text):
    path, out = lines(tmp_path, '{"id": "0"}'), tmp_path / "out.jsonl"
    out.write_text(text)
    with open_ledger() as ledger:
        ledger.scan(path)
        with pytest.raises(ValueError, match="name another --output"):
            ledger.resume(out)
    assert out.read_text() == text


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--replicas", "0"], "--replicas must be positive"),
        (["--row-timeout", "-1"], "--row-timeout must be positive"),
        (["--input", "none.jsonl"], "none.jsonl is no file"),
        (["--output", "in.jsonl"], "another file than --input"),
        (["--enable-metrics"], "--enable-metrics has no effect here"),
        (["--port", "9000"], "--port has no effect here"),
    ],
)
def test_bad_arguments(tmp_path, monkeypatch, capsys, options, text):
    monkeypatch.chdir(tmp_path)
    lines(tmp_path, "{}")
    assert main(["batch", "--model", "m", "--input", "in.jsonl", "--output", "out.jsonl", *options]) == 2
    assert text in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "text"),
    [
        (["--replicas", "0"], "--replicas must be positive"),
        (["--drain-timeout", "0"], "--drain-timeout must be positive"),
        (["--min-replicas", "2"], "--min-replicas needs --max-replicas"),
        (["--replicas", "3", "--max-replicas", "2"], "must lie between"),
        (["--uds", "a.sock"], "--uds has no effect here (the address of the replicas is Ray Serve's)"),
        (["--ssl-keyfile", "key.pem"], "--ssl-keyfile and --ssl-certfile belong together"),
        (["--ssl-ca-certs", "ca.pem"], "--ssl-ca-certs has no effect here"),
        (["--api-server-count", "2"], "--api-server-count has no effect here"),
    ],
)
def test_bad_arguments_of_serve(capsys, options, text):
    assert main(["serve", "m", *options]) == 2
    assert text in capsys.readouterr().err


# -- workers -------------------------------------------------------------------------------------------------------


class Flaky:
    """A worker that ends after so many answers, each time it was started; None: never. `hangs`: it stops answering."""

    def __init__(self, lives=(), hangs=False, fails=0):
        self.lives, self.hangs, self.fails = list(lives), hangs, fails
        self.left, self.answered, self.starts, self.most = None, [], 0, 0
        self.running = 0

    async def start(self):
        self.starts += 1
        await asyncio.sleep(0.001)
        if self.starts <= self.fails:
            raise WorkerLost("no start")
        self.left = self.lives.pop(0) if self.lives else None

    async def answer(self, text):
        self.running += 1
        self.most = max(self.most, self.running)
        try:
            await asyncio.sleep(0.001)
            if self.left == 0:
                await asyncio.sleep(10 if self.hangs else 0)
                raise WorkerLost("gone")
            if self.left is not None:
                self.left -= 1
            if text == "poison":
                self.left = 0
                raise WorkerLost("gone")
            self.answered.append(text)
            return rows.error_line(text, "x")
        finally:
            self.running -= 1

    async def stop(self):
        pass


def drive(workers, texts, **more):
    """(ids of the written lines, totals)."""
    written = []
    driver = Driver(workers, lambda line: written.append(json.loads(line)["custom_id"]), **more)
    asyncio.run(driver.run(Row(place, text, text) for place, text in enumerate(texts)))
    return written, driver.totals


NAMES = [f"row {i}" for i in range(300)]


@pytest.mark.parametrize("keep_order", [False, True])
def test_every_row_has_one_line_though_workers_are_lost(keep_order):
    workers = [Flaky([20, 0, 35]), Flaky([50]), Flaky()]
    written, totals = drive(workers, NAMES, limits=Limits(in_flight=8), keep_order=keep_order)
    assert (written == NAMES) if keep_order else (sorted(written) == sorted(NAMES))
    assert totals.losses >= 3 and totals.rows == totals.errors == len(NAMES)
    assert all(worker.answered for worker in workers) and max(worker.most for worker in workers) == 8


def test_a_worker_that_does_not_answer_is_lost():
    written, totals = drive([Flaky([5], hangs=True), Flaky()], NAMES, limits=Limits(in_flight=4, row_s=0.2))
    assert sorted(written) == sorted(NAMES) and totals.losses == 1


@pytest.mark.parametrize("num_workers", [1, 3])
def test_a_row_that_takes_workers_along_takes_no_other_row(num_workers):
    texts = ["poison" if i == 40 else name for i, name in enumerate(NAMES)]
    workers = [Flaky() for _ in range(num_workers)]
    written, totals = drive(workers, texts, limits=Limits(in_flight=16, attempts=3))
    assert sorted(written) == sorted(texts) and totals.losses == 3
    answered = [text for worker in workers for text in worker.answered]
    assert set(answered) == set(texts) - {"poison"}


def test_few_rows_are_held_back_for_the_order():
    """A slow first row: those behind it wait in the file, not in memory."""
    driver = Driver([], print, Limits(window=16), keep_order=True)
    taken, ahead = [], []

    class Slow(Flaky):
        async def answer(self, text):
            taken.append(text)
            if text == NAMES[0]:
                await asyncio.sleep(0.2)
                ahead.append(len(taken))
            return rows.error_line(text, "x")

    written, _ = drive([Slow()], NAMES, limits=driver.limits, keep_order=True)
    assert written == NAMES and ahead[0] <= driver.limits.window


def test_an_error_of_one_row_is_its_line():
    class Wrong(Flaky):
        async def answer(self, text):
            if text == NAMES[5]:
                raise KeyError("unforeseen")
            return await super().answer(text)

    written, totals = drive([Wrong()], NAMES)
    assert sorted(written) == sorted(NAMES) and totals.losses == 0


def test_what_fails_while_rows_are_read_is_told():
    """And is not taken for the end of the file."""

    def some():
        yield from (Row(place, name, name) for place, name in enumerate(NAMES[:20]))
        raise OSError("the disk is gone")

    written = []
    with pytest.raises(RuntimeError, match="OSError after .* rows: the disk is gone"):
        asyncio.run(Driver([Flaky(), Flaky()], written.append).run(some()))


def test_no_engine_left():
    with pytest.raises(RuntimeError, match="no engine is left, after 0 rows: no start"):
        drive([Flaky(fails=9), Flaky(fails=9)], NAMES)
    # One that never starts is no harm beside another.
    written, _ = drive([Flaky(fails=9), Flaky()], NAMES)
    assert sorted(written) == sorted(NAMES)


def test_totals():
    totals = Totals()
    report = {"dvlm": {"kv_blocks_before": 9, "kv_blocks_after": 3}}
    body = {"usage": {"completion_tokens": 5}, "kv_transfer_params": report}
    totals.add(json.dumps({"custom_id": "a", "response": {"status_code": 200, "body": body}, "error": None}))
    totals.add(rows.error_line("b", "x"))
    assert (totals.rows, totals.errors, totals.tokens, totals.blocks_freed) == (2, 1, 5, 6)


def test_rows_of_a_resumed_file(tmp_path):
    path = lines(tmp_path, '{"id": "a", "question": "x"}', "oops", '{"id": "b", "question": "x"}')
    out = tmp_path / "out.jsonl"
    out.write_text(rows.error_line("a", "x") + "\n")
    arguments = command.argparse.Namespace(input=path, model="m")
    with open_ledger() as ledger:
        ledger.scan(path)
        ledger.resume(out)
        found = list(command.rows_of(arguments, ledger, FIELDS))
    assert [(row.place, row.name, row.request is None) for row in found] == [(0, "line-2", True), (1, "b", False)]
    assert "in.jsonl, line 2: no JSON" in found[0].error


def test_what_nobody_thought_of_in_a_row_stops_no_other(tmp_path, monkeypatch):
    """An exception inside a generator ends it for everybody."""
    path = lines(tmp_path, *(json.dumps({"id": i, "question": "x"}) for i in range(3)))
    make = command.request_of

    def request_of(line, *more):
        return make(line, *more) if line.name != "1" else 1 / 0

    monkeypatch.setattr(command, "request_of", request_of)
    with open_ledger() as ledger:
        ledger.scan(path)
        found = list(command.rows_of(command.argparse.Namespace(input=path, model="m"), ledger, FIELDS))
    assert [row.request is None for row in found] == [False, True, False] and "ZeroDivisionError" in found[1].error
