"""`python -m intervenable`: the commands of the library."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from intervenable import demo, map_command, sweep_command


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; the result is the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m intervenable",
        description="Swap, edit and read activations inside of PyTorch models.",
    )
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    command = commands.add_parser(
        "demo",
        help="swap one activation between two prompts, then map where the answer comes from",
        description="Run one prompt with an activation of another, print how the next token changes and what was"
        " touched,\nthen do so at every layer and token and draw the result.",
        epilog="examples:\n"
        "  python -m intervenable demo\n"
        "  python -m intervenable demo --model HuggingFaceTB/SmolLM2-135M-Instruct --out smollm2.png\n"
        '  python -m intervenable demo --base "The capital of France is" --source "The capital of Japan is"',
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    demo.add_options(command)
    command.set_defaults(run=demo.run)
    command = commands.add_parser(
        "sweep",
        help="patch every layer and token in turn, and draw what becomes of the answer",
        description="Put activations of one run into another, place by place, measure what the model then answers,"
        " and draw the map.",
        epilog="examples:\n"
        '  python -m intervenable sweep --clean "The capital of Spain is" --corrupted "The capital of Italy is"\n'
        "  python -m intervenable sweep --component head_attention_value_output --axes layer,head --out heads.png\n"
        "  python -m intervenable sweep --component mlp_output --value zero --metric probability",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    sweep_command.add_options(command)
    command.set_defaults(run=sweep_command.run)
    command = commands.add_parser(
        "verify",
        help="print where the components of a model are, and whether every law about them holds",
        description="Find out where the components of a model are, run it to see whether that is true, and print the"
        " tree of\nits modules and the table of laws. The exit code is 0 if all hold and 1 if one is broken.",
        epilog="examples:\n"
        "  python -m intervenable verify\n"
        "  python -m intervenable verify HuggingFaceTB/SmolLM2-135M-Instruct --components block_output query_output\n"
        "  python -m intervenable verify meta-llama/Llama-3.1-70B --twin",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    map_command.add_options(command)
    command.set_defaults(run=map_command.run)
    options = parser.parse_args(arguments)
    code: int = options.run(options)
    return code


if __name__ == "__main__":
    sys.exit(main())
