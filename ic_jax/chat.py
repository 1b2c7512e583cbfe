"""``ic-jax chat``: a conversation in the terminal with a model that has a chat template.

``/reset`` forgets the conversation, ``/exit`` or ctrl-d ends it, ctrl-c stops an answer. Lines are read from stdin,
answers go to stdout, the rest to stderr, so a conversation can be scripted: ``ic-jax chat -q < questions.txt``.
"""

from __future__ import annotations

import sys

from . import cli, pattern_file
from .errors import UserError
from .generate import title

HELP = "/reset forgets the conversation, /exit or ctrl-d ends it, ctrl-c stops an answer"


def read_line(console: cli.Console) -> str | None:
    """The next line of the user, None at the end. On a terminal, with line editing."""
    if sys.stdin.isatty() and sys.stdout.isatty():
        try:
            return input("> ")
        except EOFError:
            console.write("\n")
            return None
    line = sys.stdin.readline()
    return line.rstrip("\r\n") if line else None


def answer(lm, messages: list[dict], args, params, console: cli.Console) -> str:
    """The streamed answer to ``messages``; what there is of it when the user presses ctrl-c."""
    text, piece = "", None
    try:
        for piece in lm.stream_chat(messages, max_tokens=args.max_tokens, sampling=params):
            text += piece.text
            console.write(piece.text)
    except KeyboardInterrupt:
        console.status("\n(stopped)")
    console.write("\n")
    if piece is not None:
        cut = f", cut at -m {args.max_tokens}" if piece.finish_reason == "length" else ""
        console.status(f"[{piece.generation_tokens} tokens, {piece.generation_tps:.1f} tokens-per-sec{cut}]")
    return text


def converse(lm, args, params, console: cli.Console) -> None:
    """Read, answer and remember until the user leaves."""
    start = [] if args.system_prompt is None else [dict(role="system", content=args.system_prompt)]
    messages = list(start)
    while (line := read_line(console)) is not None:
        command = line.strip()
        if command in ("/exit", "/quit"):
            return
        if command == "/reset":
            messages = list(start)
            console.status("(the conversation is forgotten)")
        elif command == "/help":
            console.status(HELP)
        elif command:
            question = dict(role="user", content=line)
            try:
                text = answer(lm, [*messages, question], args, params, console)
            except UserError as e:  # too long for the context, most likely: the conversation can be mended
                console.complain(f"{e} (/reset begins anew)")
                continue
            messages += [question, dict(role="assistant", content=text)]


def _body(args) -> None:
    params = cli.sampling(args)
    if args.coordinator or args.num_processes:
        raise UserError("a conversation has one process; several serve ic-jax generate")
    from .config import Config
    from .tokenizer import Tokenizer

    directory = cli.model_directory(args)
    config = Config.load(directory)
    cli.pattern(args, config.num_hidden_layers)
    if not Tokenizer(directory).has_chat_template:
        raise UserError(f"{pattern_file.model_name(args.model)} has no chat template; for plain text: ic-jax generate")
    console = cli.Console(args.quiet)
    lm = cli.load(args, console)
    console.status(title(lm))
    console.status(HELP)
    if sys.stdin.isatty():
        import readline  # noqa: F401  (gives input() line editing and history)
    converse(lm, args, params, console)


def _parser():
    parser = cli.Parser("chat", "A conversation in the terminal. " + HELP[0].upper() + HELP[1:] + ".")
    parser.add_argument("--system-prompt", metavar="TEXT", help="a system message before the conversation")
    cli.add_sampling_flags(parser)
    cli.add_model_flags(parser)
    return parser


def main(argv=None) -> int:
    """Exit status of ``ic-jax chat``."""
    return cli.run(_body, _parser(), argv)


if __name__ == "__main__":
    sys.exit(main())
