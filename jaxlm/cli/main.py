"""The `jaxlm` command: finds the subcommand and imports only that one, so that help and mistakes answer at once."""

import importlib
import os
import sys
from collections.abc import Sequence

import jaxlm

COMMANDS = {
    "info": "what a checkpoint holds: architecture, parameters, context length, tokenizer",
    "generate": "continue a prompt, or answer it as a chat, and stream the text",
    "chat": "talk with a model, with its template and a cache kept between turns",
    "eval": "perplexity of a text file, or tasks of lm-evaluation-harness",
    "train": "train or fine-tune from a YAML file of settings; resumes where it stopped",
    "convert": "write a checkpoint as Hugging Face safetensors, also from GGUF",
    "prepare": "tokenize a data set once, into a cache for training",
    "verify": "compare a checkpoint's logits and greedy text with transformers (needs torch)",
    "plan": "whether a run fits a machine, and what it takes, without the machine",
    "families": "the architectures there are, and how near each is to transformers",
}
# What bad input raises, and too small a machine; anything else is a mistake of ours, and its traceback is wanted.
BAD_INPUT = (ValueError, OSError, NotImplementedError, MemoryError)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code: 0, 1 (verify: does not match) or 2 (bad input)."""
    args = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in args
    args = [arg for arg in args if arg != "--debug"]
    if not args:
        print(usage(), file=sys.stderr)
        return 2
    if args[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if args[0] in ("-V", "--version"):
        print(f"jaxlm {jaxlm.__version__}")
        return 0
    if args[0] not in COMMANDS:
        return _error(f"no command {args[0]!r}: expected one of {', '.join(COMMANDS)}")
    try:
        return run(args[0], args[1:])
    except BrokenPipeError:  # the reader (`| head`) has gone; nothing is left to say, at exit neither
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except BAD_INPUT as problem:
        if debug:
            raise
        return _error(str(problem) or type(problem).__name__)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def run(command: str, args: list[str]) -> int:
    """Parses a command's arguments by the signature of its function, and calls it."""
    import tyro

    # transformers would say at every start that it cannot run models here; only its tokenizers are used.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    module = importlib.import_module(f"jaxlm.cli.{command}")
    options = (tyro.conf.FlagCreatePairsOff, tyro.conf.UseAppendAction)
    return tyro.cli(getattr(module, command), prog=f"jaxlm {command}", args=args, config=options) or 0


def usage() -> str:
    """The text of `jaxlm --help`."""
    commands = "\n".join(f"  {name:<10}{text}" for name, text in COMMANDS.items())
    return f"""usage: jaxlm COMMAND ...

Hugging Face checkpoints in JAX. SOURCE is a checkpoint's directory, a .gguf or .pth
file, or org/name on the hub.

commands:
{commands}

jaxlm COMMAND --help tells a command's options, with an example.

options, with every command:
  --debug     show the traceback of an error
  --version   show the version"""


def _error(message: str) -> int:
    print(f"error: {message}", file=sys.stderr)
    return 2
