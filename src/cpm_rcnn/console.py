"""The program ``cpm-rcnn``: ``cpm-rcnn train ...`` is ``python -m cpm_rcnn.train ...``."""

import runpy
import sys
from collections.abc import Sequence
from importlib.metadata import version

COMMANDS = {
    "train": "train a model, evaluate it, write plots and tables",
    "eval": "COCO metrics and an error report of a checkpoint",
    "predict": "detect in images and videos, draw the detections",
    "check": "check the annotations and images of a data set",
    "compare": "compare evaluations",
    "convert": "convert released weights into a checkpoint",
    "export": "write a detector to an ONNX file or a .pt2 file",
}

# Hydra knows the groups and options of a command; COMP_LINE is its protocol.
_COMPLETION = """\
_cpm_rcnn() {{
  local file word="${{COMP_WORDS[COMP_CWORD]}}"
  if (( COMP_CWORD == 1 )); then
    COMPREPLY=($(compgen -W "{commands} completion --version --help" -- "$word"))
  else
    local choices rest="${{COMP_LINE#* * }}"
    choices=$(COMP_LINE="cpm-rcnn $rest" COMP_POINT=0 cpm-rcnn "${{COMP_WORDS[1]}}" -sc query=bash 2> /dev/null)
    COMPREPLY=($(compgen -W "$choices" -- "$word"))
    # The value of an option without choices may be a file.
    if [[ ${{#COMPREPLY[@]}} = 0 && "$word" = *=* ]]; then
      [ -z "${{ZSH_VERSION:-}}" ] || setopt local_options null_glob
      for file in "${{word#*=}}"*; do
        if [ -d "$file" ]; then file="$file/"; fi
        if [ -e "$file" ]; then COMPREPLY+=("${{word%%=*}}=$file"); fi
      done
    fi
  fi
}}
if [ -n "${{ZSH_VERSION:-}}" ]; then
  autoload -Uz compinit bashcompinit
  whence compdef > /dev/null || compinit
  bashcompinit
fi
COMP_WORDBREAKS=${{COMP_WORDBREAKS//=}}
complete -o nospace -o default -F _cpm_rcnn cpm-rcnn
"""


def usage() -> str:
    """What ``cpm-rcnn --help`` prints."""
    lines = ["usage: cpm-rcnn COMMAND [GROUP=CHOICE ...] [OPTION=VALUE ...]", ""]
    lines += [f"  {name:10} {summary}" for name, summary in COMMANDS.items()]
    lines += [f'  {"completion":10} print a script for bash and zsh: eval "$(cpm-rcnn completion)"', ""]
    lines += ["cpm-rcnn COMMAND --help explains a command, cpm-rcnn --version prints the version."]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Run a command.

    Args:
        arguments: those after the program's name; None takes them from ``sys.argv``.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    command = given[0] if given else "--help"
    if command in COMMANDS:
        sys.argv = ["cpm-rcnn", *given[1:]]
        # As python -m does it, so that Lightning starts further processes in the same way.
        runpy.run_module(f"cpm_rcnn.{command}", run_name="__main__", alter_sys=True)
    elif command in ("--help", "-h", "help"):
        print(usage())
    elif command in ("--version", "-V"):
        print(f"cpm-rcnn {version('cpm-rcnn')}")
    elif command == "completion":
        print(_COMPLETION.format(commands=" ".join(COMMANDS)), end="")
    else:
        print(f"error: {command}: no such command; cpm-rcnn has {', '.join(COMMANDS)}", file=sys.stderr)
        sys.exit(2)
