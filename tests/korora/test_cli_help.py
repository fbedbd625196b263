"""`--help` reads well and comes at once, and the program imports nothing that its own requirements do not bring."""

import ast
import importlib.metadata
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PACKAGES = ("korora", "proxy", "chunking", "crypto")
PKI = ("init", "issue", "revoke", "crl", "list")
STORE = ("status", "forget")
RECEIPTS = ("list", "show", "verify", "prove", "consistency", "export")
POLICY = ("check", "explain")
VTPM = ("status", "epochs", "request", "export", "import", "withdraw", "settle")
CTL = ("cancel", "limit", "reload", "drain")
COMMANDS = (
    *(
        "",
        "receive",
        "send",
        "xl",
        "serve",
        "top",
        "demo",
        "preflight",
        "inspect",
        "pki",
        "ctl",
        "store",
        "receipts",
        "policy",
        "attest",
        "vtpm",
    ),
    "approve",
    *(f"policy {name}" for name in POLICY),
    *(f"vtpm {name}" for name in VTPM),
    *(f"pki {name}" for name in PKI),
    *(f"ctl {name}" for name in CTL),
    *(f"store {name}" for name in STORE),
    *(f"receipts {name}" for name in RECEIPTS),
)
COLUMNS = 80


def korora(*arguments: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "korora", *arguments], capture_output=True, text=True, timeout=30, check=False
    )


@pytest.mark.parametrize("command", COMMANDS, ids=lambda command: command or "korora")
def test_help_fits_a_terminal(command: str) -> None:
    shown = korora(*command.split(), "--help")
    assert (shown.returncode, shown.stderr) == (0, "")
    lines = shown.stdout.splitlines()
    assert lines[0].startswith(f"Usage: korora {command}".rstrip())
    assert all(len(line) <= COLUMNS for line in lines)
    assert "..." not in re.sub(r"\[(ARGS|SESSION)\]\.\.\.", "", shown.stdout)  # a summary that was cut off says nothing
    assert all(line.endswith(".") for line in shown.stdout.partition("Commands:\n")[2].splitlines())


@pytest.mark.parametrize("command", ["receive", "send"])
def test_help_says_what_an_endpoint_and_an_exit_code_are(command: str) -> None:
    from proxy.endpoints.spec import FORMS
    from proxy.errors import OUTCOMES

    shown = korora(command, "--help").stdout
    for form in FORMS.split(", "):
        assert re.search(rf"^ +{re.escape(form)}  +\w", shown, re.MULTILINE), form
    codes = " ".join(shown.partition("Exit codes:")[2].split())
    assert re.findall(r"\b\d+\b", codes) == [*map(str, sorted(OUTCOMES)), "130", "143"]


def test_version() -> None:
    from korora import __version__

    assert korora("--version").stdout == f"korora {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["receive", "--help"], ["serve", "--help"], ["ctl", "limit"], ["pki", "issue"], ["frobnicate"]],
    ids=" ".join,
)
def test_what_needs_no_work_imports_no_machinery(arguments: list[str]) -> None:
    # rich comes in with structlog, OpenSSL with the identity: together they take ten times as long as the rest.
    heavy = ["OpenSSL", "cryptography", "nacl", "blake3", "uvloop", "asyncio", "structlog", "rich", "msgspec"]
    program = (
        "import sys\n"
        f"sys.argv = ['korora', *{arguments!r}]\n"
        "from korora.__main__ import main\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        f"print([name for name in {heavy!r} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_transport_starts_without_rich(tmp_path: Path) -> None:
    """structlog would load it, and a machine waits."""
    program = (
        "import sys\n"
        f"sys.argv = ['korora', 'xl', '--daemon', '{tmp_path}/none', '--identity', '{tmp_path}/none', 'host']\n"
        "from korora.__main__ import main\n"
        "try:\n    main()\n"
        "except SystemExit:\n    pass\n"
        "print([name for name in ('structlog', 'rich') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.splitlines()[-1] == "['structlog']", done.stderr


@pytest.mark.parametrize("module", ["korora.daemon.worker", "korora.daemon.main"])
def test_a_daemon_s_processes_start_without_rich(module: str) -> None:
    """Each of them would load it for tracebacks that nobody sees."""
    program = f"import sys, {module}; print([name for name in ('structlog', 'rich') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert done.stdout.splitlines()[-1] == "['structlog']", done.stderr


def test_a_command_is_loaded_without_the_others() -> None:
    program = (
        "import sys\n"
        "from korora.cli.main import command_line\n"
        "command_line(['xl', '-e', 'host'])\n"
        "print([name for name in sys.modules if name.startswith('korora.cli.')])"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=True)
    assert set(ast.literal_eval(done.stdout)) == {f"korora.cli.{name}" for name in ("main", "options", "relay")}


def _imported() -> set[str]:
    """The top-level names that the program's sources import, from whatever place in a file."""
    names: set[str] = set()
    for package in PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if isinstance(node, ast.Import):
                    names |= {alias.name.partition(".")[0] for alias in node.names}
                elif isinstance(node, ast.ImportFrom) and node.module:
                    names.add(node.module.partition(".")[0])
    return names


def test_every_import_is_declared() -> None:
    """A package that is only there because a development tool brought it is missing where the program is installed.

    What an extra brings counts: the program names the extra where it is missing.
    """
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = {
        re.split(r"[<>=!~\[ ]", requirement)[0].lower().replace("_", "-")
        for requirement in [*project["dependencies"], *extras["plot"], *extras["tpm"]]
    }
    providers = importlib.metadata.packages_distributions()
    foreign = _imported() - set(sys.stdlib_module_names) - set(PACKAGES)
    undeclared = {
        name
        for name in foreign
        if not declared & {provider.lower().replace("_", "-") for provider in providers.get(name, [])}
    }
    assert not undeclared
