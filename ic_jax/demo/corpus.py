"""Text and tokens for the demo model: free documents from Debian packages, a tokenizer, synthetic recall tasks.

    apt-get install python3.11-doc postgresql-doc-15 r-cran-janeaustenr sword-text-web
    python -m ic_jax.demo.corpus --out DIR [--root UNPACKED]

``--root`` is where the packages' files lie (``/``, or a folder filled with ``dpkg -x``). Writes DIR/tokenizer.json,
tokenizer_config.json, text.npy, heldout.npy, recall.npy (token ids, uint16) and corpus.json (what went in).
``train`` takes it from there; nothing of it is needed to run the model. Licences: LICENSE-* beside this file.
"""

from __future__ import annotations

import argparse
import html.parser
import json
import re
import struct
import zlib
from pathlib import Path

import numpy as np

SPECIAL = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|system|>")
VOCABULARY = 4096
ROW = 1025  # tokens of a recall row: a training context and the token after it
ANSWER = 1 << 15  # this bit of a recall token marks it as part of an answer
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] }}"
    "{% if m['role'] == 'assistant' %}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


# Sources: each yields documents. -------------------------------------------------------------------------------------
def python_docs(root: Path):
    """The Python 3.11 documentation, reStructuredText (PSF licence)."""
    for path in sorted((root / "usr/share/doc/python3.11/html/_sources").rglob("*.rst.txt")):
        yield path.read_text()


class _Page(html.parser.HTMLParser):
    """Text of one HTML page of the PostgreSQL manual, navigation left out."""

    def __init__(self):
        super().__init__()
        self.parts, self.pre, self.skip = [], 0, 0

    def handle_starttag(self, tag, attrs):
        if tag == "div" and (self.skip or dict(attrs).get("class") in ("navheader", "navfooter", "toc")):
            self.skip += 1
        self.pre += tag == "pre"
        if tag in ("p", "pre", "h1", "h2", "h3", "h4", "dt", "li", "tr", "div"):
            self.parts.append("\n" if tag in ("li", "tr", "dt") else "\n\n")
        elif tag == "td":
            self.parts.append(" ")

    def handle_endtag(self, tag):
        self.skip -= tag == "div" and self.skip > 0
        self.pre -= tag == "pre"

    def handle_data(self, data):
        if not self.skip:
            self.parts.append(data if self.pre else re.sub(r"\s+", " ", data))


def postgresql_docs(root: Path):
    """The PostgreSQL 15 manual as plain text (PostgreSQL licence)."""
    for path in sorted((root / "usr/share/doc/postgresql-doc-15/html").glob("*.html")):
        if path.name in ("bookindex.html", "features-sql-standard.html", "sql-keywords-appendix.html"):
            continue
        page = _Page()
        page.feed(re.sub(r"(?s)^.*?<body", "<body", path.read_text()))
        yield re.sub(r" *\n[ \n]*\n", "\n\n", "".join(page.parts))


def austen(root: Path):
    """Jane Austen's six novels by chapter, out of an R data file (public domain)."""
    data = (root / "usr/lib/R/site-library/janeaustenr/data/Rdata.rdb").read_bytes()
    while data:
        stream = zlib.decompressobj()
        raw, data = stream.decompress(data[4:]), stream.unused_data
        lines, at = [], raw.index(b"\x00\x04\x00\x09")
        while raw[at : at + 4] in (b"\x00\x04\x00\x09", b"\x00\x00\x80\x09"):  # R's CHARSXP: flags, length, bytes
            size = struct.unpack(">I", raw[at + 4 : at + 8])[0]
            lines.append(raw[at + 8 : at + 8 + size].decode("utf-8", "replace"))
            at += 8 + size
        text = re.sub(r"(?<=\S)\n(?=\S)", " ", "\n".join(lines)).replace("--", " -- ").replace("_", "")
        yield from re.split(r"\n(?=(?:CHAPTER|Chapter) [\dIVXL]+\b)", text)


def world_english_bible(root: Path):
    """The World English Bible by chapter, out of a SWORD module (public domain)."""
    folder = root / "usr/share/sword/modules/texts/ztext/engWEB2015eb"
    for part in ("ot", "nt"):
        index, blocks = (folder / f"{part}.bzs").read_bytes(), (folder / f"{part}.bzz").read_bytes()
        for start, size, _ in struct.iter_unpack("<III", index):
            text = zlib.decompress(blocks[start : start + size]).decode("utf-8", "replace")
            text = re.sub(r"(?s)<note.*?</note>", " ", text)
            for chapter in re.split(r'<chapter n="\d+"[^>]*sID[^>]*>', text)[1:]:
                chapter = re.sub(r'<div sID="[^"]*" type="x-p"/>|<l(g| )[^>]*sID[^>]*>', "\n", chapter)
                chapter = re.sub(r"[ \x00-\x09]+", " ", re.sub(r"<[^>]*>", "", chapter))
                yield re.sub(r" ?([,.;:!?”’])", r"\1", re.sub(r"\s*\n\s*", "\n", chapter))


SOURCES = (python_docs, postgresql_docs, austen, world_english_bible)


def documents(root: Path):
    """(training, held-out) lists of documents; every 50th document of each source is held out."""
    train, held = [], []
    for source in SOURCES:
        texts = [t for t in (text.strip() for text in source(root)) if len(t) > 200]
        for i, text in enumerate(texts):
            (held if i % 50 == 49 else train).append((source.__name__, text))
    return train, held


# Tokenizer. ----------------------------------------------------------------------------------------------------------
def train_tokenizer(texts):
    """Byte-level BPE with single digits, ``VOCABULARY`` entries, special tokens first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=list(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


# Recall tasks. -------------------------------------------------------------------------------------------------------
NAMES = (
    "Anna Ben Clara David Emma Felix Grace Henry Iris James Kate Leo Mary Noah Olive Paul Rosa Sam Tom Vera "
    "Will Alice Bob Carol Edward Frank George Helen John Jane Lucy Mark Peter Ruth Sarah Simon Thomas Harriet"
).split()
THINGS = (
    "box key house car door garden letter map phone ring ship table tree room book stone coin bag lamp boat"
).split()
PLACES = (
    "London Rome Egypt Bath Paris Berlin India Spain Israel Canada Norway Cairo Oxford Dublin Boston Athens Milan Lima"
).split()
COLOURS = "red blue green white black yellow brown golden silver purple grey pink".split()
# (statement, question, answer) with {n}ame, {t}hing and {v}alue; the kind of value stands last.
TEMPLATES = (
    ("The code for {n}'s {t} is {v}.", "What is the code for {n}'s {t}?", "number"),
    ("The secret number of {n} is {v}.", "What is the secret number of {n}?", "number"),
    ("{n} paid {v} for the {t}.", "How much did {n} pay for the {t}?", "number"),
    ("{n} keeps the {t} in {v}.", "Where does {n} keep the {t}?", "place"),
    ("{n} lives in {v}.", "Where does {n} live?", "place"),
    ("{n}'s {t} is {v}.", "What colour is {n}'s {t}?", "colour"),
)


def value_of(kind, rng) -> str:
    if kind == "number":
        return "".join(map(str, rng.integers(0, 10, 4)))
    return str(rng.choice(PLACES if kind == "place" else COLOURS))


def facts(rng, n: int) -> list[tuple[str, str, str]]:
    """``n`` (statement, question, answer) triples with different questions."""
    out: dict[str, tuple] = {}
    while len(out) < n:
        statement, question, kind = TEMPLATES[rng.integers(len(TEMPLATES))]
        fill = {"n": str(rng.choice(NAMES)), "t": str(rng.choice(THINGS)), "v": value_of(kind, rng)}
        out.setdefault(question.format(**fill), (statement.format(**fill), question.format(**fill), fill["v"]))
    return list(out.values())


class Recall:
    """Makes rows of ``ROW`` tokens whose answers stand far back in the row; distractors are slices of ``text_T``."""

    def __init__(self, tokenizer, text_T, seed: int):
        self.tokenizer, self.text_T = tokenizer, text_T
        self.rng = np.random.default_rng(seed)
        self.end, self.user, self.assistant, _ = (tokenizer.token_to_id(s) for s in SPECIAL)

    def ids(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def distractor(self, n: int) -> list[int]:
        at = self.rng.integers(0, len(self.text_T) - n)
        return self.text_T[at : at + n].tolist()

    def turn(self, question: str, answer: str, context=()) -> list[int]:
        """One exchange of a chat, the answer's tokens and its end marked."""
        marked = [t | ANSWER for t in [*self.ids(answer), self.end]]
        return [self.user, *context, *self.ids(question), self.assistant, *marked]

    def needles(self, n: int, hidden: int) -> list[int]:
        """A chat of ``n`` tokens: ``hidden`` facts strewn in text, then questions about them in random order."""
        rng, known = self.rng, facts(self.rng, hidden)
        turns = [self.turn(q, a) for _, q, a in known]
        rng.shuffle(turns)
        tail = [t for turn in turns for t in turn][1:]
        said = [self.ids(f" {s} ") for s, _, _ in known]
        free = n - 2 - sum(map(len, said)) - len(tail)
        cuts = np.sort(rng.integers(0, max(free, 1), len(said)))
        text, out = self.distractor(max(free, 1)), [self.user]
        for before, after, fact in zip([0, *cuts], cuts, said, strict=False):
            out += text[before:after] + fact
        return (out + text[cuts[-1] :] + self.ids("\n\n")[:1] + tail)[:n]

    def table(self, n: int) -> list[int]:
        """Lines ``key: value``, then the same keys asked again in random order, as plain text, until ``n`` tokens."""
        rng, out = self.rng, []
        while len(out) < n:
            size = int(rng.integers(4, 33))
            words = rng.choice(NAMES + THINGS, size, replace=False)
            kind = rng.choice(["number", "place", "colour"])
            pairs = [(str(w), value_of(kind, rng)) for w in words]
            out += self.ids("".join(f"{k}: {v}\n" for k, v in pairs) + "\n")
            for i in rng.permutation(size):
                out += [*self.ids(f"{pairs[i][0]}:"), *(t | ANSWER for t in self.ids(f" {pairs[i][1]}\n"))]
            out.append(self.end)
        return out[:n]

    def copy(self, n: int) -> list[int]:
        """A slice of text, a gap of other text, and the slice again."""
        rng, out = self.rng, []
        while len(out) < n:
            part, gap = self.distractor(int(rng.integers(16, 160))), self.distractor(int(rng.integers(8, 400)))
            out += [*self.ids("Repeat:"), *part, *self.ids("\n\n"), *gap, *self.ids("\n\nRepeat:"), *part[:4]]
            out += [*(t | ANSWER for t in part[4:]), self.end]
        return out[:n]

    def row(self) -> list[int]:
        kind = self.rng.random()
        if kind < 0.25:
            return self.table(ROW)
        if kind < 0.35:
            return self.copy(ROW)
        out: list[int] = []
        while len(out) < ROW:  # one long chat, or several shorter ones
            n = min(ROW - len(out), int(self.rng.choice([200, 400, ROW, ROW])))
            out += self.needles(n, int(self.rng.integers(1, 2 + n // 80))) if n > 100 else self.distractor(n)
        return out

    def rows(self, n: int) -> np.ndarray:
        return np.array([self.row() for _ in range(n)], np.uint16)

    def probe(self, distance: int, n: int = ROW - 1) -> list[int]:
        """A chat of at most ``n`` tokens that asks one question; its fact ended about ``distance`` tokens earlier."""
        (said, question, answer), *others = facts(self.rng, 4)
        turn, fact = self.turn(question, answer)[1:], self.ids(f" {said} ")
        after = max(distance - len(turn), 0)
        before = max(n - 2 - len(turn) - len(fact) - after, 0)
        noise = self.ids(" " + others[0][0] + " ") if before > 40 else []  # a fact that is not asked for
        return [self.user, *noise, *self.distractor(before - len(noise)), *fact, *self.distractor(after),
                *self.ids("\n\n")[:1], *turn]  # fmt: skip


def write_tokenizer(tokenizer, out: Path) -> None:
    tokenizer.save(str(out / "tokenizer.json"), pretty=False)
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[0], "bos_token": None,
        "additional_special_tokens": list(SPECIAL[1:]), "clean_up_tokenization_spaces": False,
        "model_max_length": 65536, "chat_template": CHAT_TEMPLATE,
    }  # fmt: skip
    (out / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")


def main(argv=None) -> None:
    parser = argparse.ArgumentParser(prog="python -m ic_jax.demo.corpus", description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--root", type=Path, default=Path("/"), help="where the packages' files lie")
    parser.add_argument("--recall-rows", type=int, default=6000)
    args = parser.parse_args(argv)
    args.out.mkdir(parents=True, exist_ok=True)
    train, held = documents(args.root)
    tokenizer = train_tokenizer(text for _, text in train)
    write_tokenizer(tokenizer, args.out)

    def encode(documents):
        end = tokenizer.token_to_id(SPECIAL[0])
        encoded = tokenizer.encode_batch([text for _, text in documents])
        return [np.array([*e.ids, end], np.uint16) for e in encoded]

    train_tokens, held_tokens = encode(train), encode(held)
    order = np.random.default_rng(0).permutation(len(train_tokens))
    text_T = np.concatenate([train_tokens[i] for i in order])
    np.save(args.out / "text.npy", text_T)
    np.save(args.out / "heldout.npy", np.concatenate(held_tokens))
    np.save(args.out / "recall.npy", Recall(tokenizer, text_T, seed=1).rows(args.recall_rows))
    size = lambda docs, name: sum(len(t.encode()) for n, t in docs if name in ("", n))
    facts_of = {s.__name__: [size(train, s.__name__), size(held, s.__name__)] for s in SOURCES}
    report = {
        "bytes (train, held out)": facts_of, "train bytes": size(train, ""), "heldout bytes": size(held, ""),
        "documents": [len(train), len(held)], "train tokens": len(text_T), "heldout tokens": sum(map(len, held_tokens)),
    }  # fmt: skip
    (args.out / "corpus.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
