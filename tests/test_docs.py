"""The documentation is correct and complete: its code runs, its commands work, its links have targets.

Python blocks of a page run in order, in one namespace. An HTML comment in front of a block changes that:

    <!-- not run: reason -->           the block is only compiled
    <!-- from ../examples/x.py -->     the block is a verbatim part of that file

Console blocks (commands after "$ ", then their output) of a page with <!-- server: OPTIONS --> run against such a
server; with <!-- while 2 are asking --> 2 other requests are live meanwhile. The output must equal the page, except for
ids, times and any text in place of "…".
"""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from urllib.parse import unquote

import pytest
from httpx2 import Client
from starlette.routing import BaseRoute, Route

from chatstream import (
    AccessSettings,
    ChatStream,
    LoadSettings,
    RuntimeSettings,
    SamplingParams,
    SchedulerSettings,
    SessionSettings,
)
from chatstream.api.app import create_app
from chatstream.api.native import ChatBody
from chatstream.api.openai import ChatCompletionBody
from chatstream.cli.app import app as command
from chatstream.engines.batching.engine import StepEngine
from chatstream.engines.process import ProcessEngine
from chatstream.errors import ChatStreamError
from chatstream.legacy import REMOVED_SETTINGS
from chatstream.scheduler import QUEUES
from tests.cli.command import environment, serving

ROOT = Path(__file__).parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
READMES = (ROOT / "README.md", ROOT / "README.ja.md")
OTHERS = [ROOT / name for name in ("ARCHITECTURE.md", "CONTRIBUTING.md", "CHANGELOG.md")]
PAGES = [*DOCS, *READMES, *OTHERS]
JAPANESE = [page for page in PAGES if page.name.endswith(".ja.md")]
URL = "http://127.0.0.1:8000"


@dataclass(frozen=True)
class Block:
    """A fenced block."""

    page: Path
    line: int
    language: str
    note: str
    """The HTML comment on the line before the block."""
    text: str

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks_of(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    pattern = r"^(?:<!-- (?P<note>[^\n]*) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$"
    for found in re.finditer(pattern, text, re.MULTILINE | re.DOTALL):
        line = text.count("\n", 0, found.start("language")) + 1
        yield Block(page, line, found["language"], found["note"] or "", found["text"])


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PYTHON = [block for block in BLOCKS if block.language == "python"]
DOCUMENTED = "\n".join(page.read_text(encoding="utf-8") for page in DOCS)
QUOTED = set(re.findall(r"`([^`\n]+)`", DOCUMENTED))
"""All texts in backquotes."""


def pages(*languages: str) -> list[Path]:
    return [page for page in PAGES if any(block.language in languages for block in blocks_of(page))]


# --- code ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", PYTHON, ids=str)
def test_python_blocks_compile(block: Block) -> None:
    compile(textwrap.dedent(block.text), str(block), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)


@pytest.fixture
def _own_policies() -> Iterator[None]:
    """Policies that a page registers are removed after it."""
    before = dict(QUEUES)
    yield
    QUEUES.clear()
    QUEUES.update(before)


@pytest.mark.usefixtures("_own_policies")
@pytest.mark.parametrize("page", pages("python"), ids=lambda page: page.name)
def test_python_blocks_run(page: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "path", [*sys.path])
    namespace: dict[str, object] = {"__name__": "docs"}
    for block in blocks_of(page):
        if block.language == "python" and not block.note.startswith(("not run: ", "from ")):
            run_block(block, namespace)


def run_block(block: Block, namespace: dict[str, object]) -> None:
    code = compile(block.text, str(block), "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
    if code.co_flags & inspect.CO_COROUTINE:
        asyncio.run(eval(code, namespace))
    else:
        exec(code, namespace)


@pytest.mark.parametrize("block", [b for b in PYTHON if b.note.startswith("from ")], ids=str)
def test_quoted_parts_of_files_are_word_for_word(block: Block) -> None:
    quoted_file = block.page.parent / block.note.removeprefix("from ")
    assert block.text in quoted_file.read_text(encoding="utf-8")


def test_notes_are_known() -> None:
    notes = {block.note for block in BLOCKS}
    assert all(re.match(r"not run: .|from \S+$|while \d are asking$|server: |$", note) for note in notes), notes


# --- commands --------------------------------------------------------------------------------------------------------


def commands_of(block: Block) -> Iterator[list[str]]:
    """Arguments of every `chatstream …` in a block."""
    for line in block.text.replace("\\\n", " ").splitlines():
        found = re.search(r"(?:^|[\s/=])chatstream (serve|chat|simulate|tune|--\w+)\b[^|&#>`]*", line)
        if found and block.language != "python":
            yield shlex.split(found[0])[1:]


@pytest.mark.parametrize("block", [b for b in BLOCKS if [*commands_of(b)]], ids=str)
def test_commands_are_valid(block: Block) -> None:
    for arguments in commands_of(block):
        command.parse_args(arguments, exit_on_error=False, print_error=False)


COMMANDS = ("serve", "chat", "simulate", "tune")


def options(*commands: str) -> set[str]:
    arguments = [a for name in commands for a in command[name].assemble_argument_collection() if a.show]
    return {name for argument in arguments for name in argument.names if not name.startswith("--empty-")}


@pytest.mark.parametrize(
    ("page", "commands"), [("run-the-server.md", ("serve", "chat")), ("simulate.md", ("simulate",))]
)
def test_every_option_is_a_row_of_the_table(page: str, commands: tuple[str, ...]) -> None:
    assert len(options(*commands)) > 20
    text = (ROOT / "docs" / page).read_text(encoding="utf-8")
    assert set(re.findall(r"^\| `(MODEL|--[a-z-]+)` \|", text, re.MULTILINE)) == options(*commands)


def test_every_option_of_tune_is_a_row_of_its_table_or_one_of_the_model() -> None:
    rows = set(re.findall(r"^\| `(MODEL|--[a-z-]+)` \|", (ROOT / "docs/tune.md").read_text("utf-8"), re.MULTILINE))
    assert len(rows) > 5
    assert rows <= options("tune") <= rows | options("chat")


def test_every_option_named_on_a_page_exists() -> None:
    ours = options(*COMMANDS)
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        foreign = {"--help", "--json", "--only", "--quick", "--rounds", "--timeout-graceful-shutdown", "--version"}
        foreign |= {"--faults", "--sample", "--show"}  # of scripts/nightly and scripts/mutate
        foreign |= {"--model", "--opt", "--task", "--weight-format"}  # of OpenVINO's converter
        foreign |= {"--llama-python", "--models", "--once", "--optimum-cli"}  # of benchmarks/engines.py, and these:
        foreign |= {"--output", "--parts", "--peers", "--work"}
        named = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", re.sub(r"<!--.*?-->", "", text)))
        assert named - foreign - ours == set(), page.name


def test_every_environment_variable_named_on_a_page_is_an_option() -> None:
    named = {name for page in PAGES for name in re.findall(r"\bCHATSTREAM_[A-Z_]+", page.read_text(encoding="utf-8"))}
    known = {"CHATSTREAM_" + option.removeprefix("--").replace("-", "_").upper() for option in options(*COMMANDS)}
    assert named - known == set()


# --- real output -----------------------------------------------------------------------------------------------------


def server_options(page: Path) -> list[str]:
    found = re.search(r"^<!-- server: (.*) -->$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return shlex.split(found[1]) if found else []


@pytest.mark.parametrize("page", [page for page in DOCS if server_options(page)], ids=lambda page: page.name)
def test_console_output_is_what_the_server_prints(page: Path) -> None:
    shown = [block for block in blocks_of(page) if block.language == "console"]
    assert shown
    with serving(*server_options(page)) as server, server.client() as client:
        for block in shown:
            others = re.match(r"while (\d) are asking", block.note)
            with asking(client, int(others[1]) if others else 0):
                for line, expected in console(block):
                    printed = run_shell(line.replace(URL, server.url))
                    assert re.fullmatch(as_pattern(expected), steady(printed)), f"{block}: $ {line}\n{printed}"


def test_pages_with_console_output_have_a_server_or_are_about_setting_up() -> None:
    with_output = {block.page for block in BLOCKS if block.language == "console" for _, out in console(block) if out}
    assert all(server_options(page) for page in with_output)


def console(block: Block) -> Iterator[tuple[str, str]]:
    """(command, what it prints)."""
    for part in re.split(r"^\$ ", block.text, flags=re.MULTILINE)[1:]:
        line, _, output = part.partition("\n")
        yield line, output


@contextmanager
def asking(client: Client, num_others: int) -> Iterator[None]:
    """Keep `num_others` other requests live in the block."""
    with ExitStack() as stack:
        for _ in range(num_others):
            body, accept = {"user_input": "Hello"}, {"accept": "text/event-stream"}
            # A fresh session each: two requests of one conversation would wait for each other.
            client.cookies.clear()
            answer = stack.enter_context(client.stream("POST", "/chat_stream", json=body, headers=accept))
            assert answer.status_code == 200
        yield
    while '"processing":0,"waiting":0' not in client.get("/get_load").text:
        pass  # they have disconnected; the server will notice soon


def run_shell(line: str) -> str:
    done = subprocess.run(["sh", "-c", line], env=environment(), capture_output=True, text=True, timeout=30)
    assert done.returncode == 0, done.stderr
    return done.stdout


def steady(output: str) -> str:
    """The output with the parts that vary between runs replaced."""
    output = output.replace("\r\n", "\n").strip()
    output = re.sub(r"[0-9a-f]{32}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", "ID", output)
    output = re.sub(r'("created":|"generated_tokens":|retry-after: |retry-after-ms: )\d+', r"\1N", output)
    return re.sub(r"\d+\.\d+(?=[,}])", "N", output)


def as_pattern(expected: str) -> str:
    return re.escape(steady(expected)).replace("…", ".*?")


# --- completeness ----------------------------------------------------------------------------------------------------


def all_errors(kind: type[ChatStreamError] = ChatStreamError) -> Iterator[type[ChatStreamError]]:
    yield kind
    for child in kind.__subclasses__():
        yield from all_errors(child)


def test_every_error_code_is_documented_with_its_status() -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (\d+|–) \|", (ROOT / "docs/errors.md").read_text("utf-8"), re.MULTILINE))
    expected = {error.code: str(error.http_status) for error in all_errors() if error.__module__ == "chatstream.errors"}
    assert rows == expected | {"config_error": "–"}


def endpoints(routes: list[BaseRoute]) -> Iterator[tuple[str, str]]:
    for route in routes:
        if isinstance(route, Route):
            for method in (route.methods or set()) - {"HEAD"}:
                yield method, re.sub(r":\w+}", "}", route.path)
        else:
            yield from endpoints(getattr(getattr(route, "original_router", None), "routes", []))


def test_every_endpoint_is_documented() -> None:
    found = set(endpoints(create_app(ChatStream()).routes))
    assert ("POST", "/chat_stream") in found
    assert ("GET", "/v1/models/{model}") in found
    quoted = {part for text in QUOTED for part in text.split(", ")}
    assert {f"{method} {path}" for method, path in found} - quoted == set()


def test_every_endpoint_named_on_a_page_exists() -> None:
    found = {f"{method} {path}" for method, path in endpoints(create_app(ChatStream()).routes)}
    named = re.findall(r"\b(?:GET|POST|DELETE|PATCH|PUT) /[\w/{}.]*", DOCUMENTED)
    assert set(named) - found == set()


@pytest.mark.parametrize(
    ("settings", "page"),
    [
        (SchedulerSettings, "waiting-and-limits.md"),
        (RuntimeSettings, "waiting-and-limits.md"),
        (SessionSettings, "conversations.md"),
        (LoadSettings, "use-your-own-model.md"),
    ],
)
def test_every_setting_is_documented_with_its_default(settings: type, page: str) -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", (ROOT / "docs" / page).read_text("utf-8"), re.MULTILINE))
    for field in fields(settings):
        value = field.default if field.default is not MISSING else None
        assert rows[field.name].split(" (")[0] == shown(value), field.name


def shown(default: object) -> str:
    match default:
        case None:
            return "none"
        case bool():
            return f"`{default}`"
        case str():
            return f'`"{default}"`'
    return f"{default:,.10g}"


@pytest.mark.parametrize(
    ("engine", "page"), [(ProcessEngine, "embed-in-fastapi.md"), (StepEngine, "write-an-engine.md")]
)
def test_every_setting_of_an_engine_is_documented_with_its_default(engine: type, page: str) -> None:
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*?) \|", (ROOT / "docs" / page).read_text("utf-8"), re.MULTILINE))
    settings = [it for it in inspect.signature(engine).parameters.values() if it.kind is it.KEYWORD_ONLY]
    assert settings
    for it in settings:
        assert rows[it.name] == ("none" if it.default is None else f"{it.default:g}"), it.name


def test_every_key_and_every_argument_of_chat_stream_is_documented() -> None:
    arguments = inspect.signature(ChatStream).parameters.keys() - {"loading"}
    arguments |= {field.name for field in fields(LoadSettings)}
    keys = {field.name for field in fields(AccessSettings)}
    words = {word for text in QUOTED for word in re.findall(r"\w+", text)}
    assert (arguments | keys) - words == set()
    page = (ROOT / "docs/embed-in-fastapi.md").read_text("utf-8")
    table = re.findall(r"^\| (`.*?) \|", page[page.index("## Arguments") : page.index("## Coming")], re.MULTILINE)
    assert set(re.findall(r"`(\w+)`", " ".join(table))) == set(arguments)


@pytest.mark.parametrize(
    ("names", "page"),
    [
        (ChatBody.model_fields, "native-api.md"),
        ([field.name for field in fields(SamplingParams)], "native-api.md"),
        (ChatCompletionBody.model_fields, "openai-api.md"),
    ],
)
def test_every_field_of_a_request_is_documented(names: list[str], page: str) -> None:
    quoted = set(re.findall(r"`(\w+)`", (ROOT / "docs" / page).read_text("utf-8")))
    assert set(names) - quoted == set()


def test_every_removed_argument_is_in_the_migration_table() -> None:
    page = (ROOT / "docs/embed-in-fastapi.md").read_text("utf-8")
    assert set(REMOVED_SETTINGS) - set(re.findall(r"`(\w+)`", page[page.index("## Coming") :])) == set()


def test_every_policy_is_documented() -> None:
    assert set(QUEUES) - QUOTED == set()


# --- links and names -------------------------------------------------------------------------------------------------


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub generates, and those that the page sets."""
    text = without_blocks(page)
    return {anchor_of(heading) for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)} | set(ANCHOR.findall(text))


ANCHOR = re.compile(r'^<a id="([\w-]+)"></a>$', re.MULTILINE)


def anchor_of(heading: str) -> str:
    return re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")


def without_blocks(page: Path) -> str:
    return re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_have_targets(page: Path) -> None:
    for link in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if link.startswith(("http://", "https://", "mailto:")):
            continue
        path, _, anchor = unquote(link).partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert not anchor or anchor in anchors_of(target), f"{page.name}: {link}"


def test_files_named_on_a_page_exist() -> None:
    folders = "src|tests|docs|examples|benchmarks|scripts"
    for page in PAGES:
        # …/v1/… is an address; a path starts a word.
        named = re.findall(rf"(?<![\w/.-])(?:{folders})/[\w./-]*\w", page.read_text(encoding="utf-8"))
        for name in named:
            assert (ROOT / name).exists(), f"{page.name}: {name}"


def test_every_page_is_in_the_index() -> None:
    index = (ROOT / "docs/README.md").read_text(encoding="utf-8")
    paths = {page.relative_to(ROOT / "docs").as_posix() for page in DOCS}
    assert {path for path in paths if f"]({path})" not in index} == {"README.md"}


def test_no_page_installs_the_original_package() -> None:
    """`chatstream` on PyPI is the original of 2023; this project has another distribution name."""
    tool, argument_before = r"\b(?:pip3?|uv|pipx|poetry) (?:pip )?(?:install|add)\b", r"(?:(?!\. )[^\n`&|;])*?"
    wrong = re.compile(tool + argument_before + r"""[ "']chatstream(?=[\["' ,`=<>~!]|$)""", re.MULTILINE)
    assert wrong.search('pip install -U "chatstream[transformers]"')
    assert not wrong.search("pip install openchatstream. Then chatstream serve")
    folders = ("src", "tests", "docs", "examples", "benchmarks", "scripts")
    paths = [path for path in ROOT.iterdir() if path.is_file()]
    paths += [path for folder in folders for path in (ROOT / folder).rglob("*")]
    texts = {"", ".css", ".html", ".js", ".md", ".py", ".toml", ".txt"}
    for path in paths:
        if path.suffix in texts and path.is_file() and path != Path(__file__):
            assert wrong.search(path.read_text(encoding="utf-8")) is None, path


# --- translations ----------------------------------------------------------------------------------------------------


def english_of(page: Path) -> Path:
    return page.with_name(page.name.replace(".ja.md", ".md"))


@dataclass(frozen=True)
class Section:
    """What a section of a page and of its translation have in common."""

    level: str
    rows: list[list[set[str]]]
    """Per row of a table and per cell: the code in it, and the number if it is one."""
    code: set[str]
    links: list[str]


def sections_of(page: Path) -> list[Section]:
    parts = re.split(r"^(#+) ", without_blocks(page), flags=re.MULTILINE)[1:]
    return [
        Section(
            level,
            [[facts_of(cell) for cell in row.split("|")] for row in re.findall(r"^\|(.*)\|$", text, re.MULTILINE)],
            set(re.findall(r"`([^`]+)`", text)),
            # A link to a Japanese page equals one to the English page.
            sorted(link.replace(".ja.md", ".md") for link in re.findall(r"\]\(([^)\s]+)\)", text)),
        )
        for level, text in zip(parts[::2], parts[1::2], strict=True)
    ]


def facts_of(cell: str) -> set[str]:
    return {*re.findall(r"^ ([\d.,]+) $", cell), *re.findall(r"`([^`]+)`", cell)}


@pytest.mark.parametrize("page", JAPANESE, ids=lambda page: page.name)
def test_a_translation_has_the_sections_tables_and_links_of_the_english_page(page: Path) -> None:
    english, japanese = sections_of(english_of(page)), sections_of(page)
    assert len(japanese) == len(english)
    for ours, theirs in zip(japanese, english, strict=True):
        assert ours == theirs


@pytest.mark.parametrize("page", JAPANESE, ids=lambda page: page.name)
def test_a_translation_has_the_code_of_the_english_page(page: Path) -> None:
    """Only comments and diagrams, blocks without a language, are translated."""

    def code(page: Path) -> list[tuple[str, str, str]]:
        return [(b.language, b.note, re.sub(r"#.*", "#", b.text)) for b in blocks_of(page) if b.language]

    assert code(page) == code(english_of(page))


@pytest.mark.parametrize("page", [page for page in JAPANESE if page in DOCS], ids=lambda page: page.name)
def test_a_translation_has_the_anchors_of_the_english_page(page: Path) -> None:
    headings = re.findall(r"^##+ (.*)$", without_blocks(english_of(page)), re.MULTILINE)
    anchors = re.findall(r'^<a id="([\w-]+)"></a>\n\n##+ ', without_blocks(page), re.MULTILINE)
    assert anchors == [anchor_of(heading) for heading in headings]


@pytest.mark.parametrize("page", JAPANESE, ids=lambda page: page.name)
def test_a_translation_and_the_english_page_link_to_each_other(page: Path) -> None:
    assert f"[English]({english_of(page).name})" in page.read_text(encoding="utf-8")
    assert f"[日本語]({page.name})" in english_of(page).read_text(encoding="utf-8")


@pytest.mark.parametrize("page", JAPANESE, ids=lambda page: page.name)
def test_a_translation_links_to_translations_and_marks_english_pages(page: Path) -> None:
    for text, link in re.findall(r"\[([^\[\]]+)\]\(([^)#\s]+\.md)[^)]*\)", page.read_text(encoding="utf-8")):
        target = (page.parent / link).resolve()
        if target not in JAPANESE and target != english_of(page):
            assert text.endswith("（英語）"), link
            assert target.with_suffix(".ja.md") not in JAPANESE, link
