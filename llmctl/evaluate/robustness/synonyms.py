"""Read synonyms: a file of the user, the files of WordNet (Miller, 1995), or a small list of English words."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

from llmctl.config.errors import RequestError

PARTS = ("noun", "verb", "adj", "adv")
"""Parts of speech of WordNet's files, such as `index.noun` and `data.noun`."""

ENGLISH = """
big, large; small, little; happy, glad; sad, unhappy; fast, quick; slow, unhurried; smart, clever; silly, foolish
good, fine; great, wonderful; bad, poor; awful, terrible, dreadful; nice, pleasant; funny, amusing; boring, dull
beautiful, lovely; ugly, unattractive; strange, odd, weird; scary, frightening; sweet, charming; strong, powerful
weak, feeble; rich, wealthy; easy, simple; hard, difficult; true, real; false, wrong; important, significant
whole, entire; complete, full; empty, vacant; brave, courageous; calm, quiet; angry, mad; tired, weary; sick, ill
old, aged; new, recent; young, youthful; famous, renowned; common, ordinary; rare, unusual; brilliant, dazzling
excellent, superb, outstanding; perfect, flawless; interesting, engaging; predictable, foreseeable; silent, noiseless
begin, start; end, finish; buy, purchase; sell, vend; help, assist; show, display; see, view; look, glance
speak, talk; say, state; tell, inform; think, believe; know, understand; want, wish; need, require; get, obtain
give, provide; make, create; build, construct; use, employ; try, attempt; keep, retain; choose, select; change, alter
grow, increase; like, enjoy; love, adore; hate, detest; laugh, giggle; cry, weep; run, sprint; walk, stroll
eat, consume; live, dwell; die, perish; kill, slay; win, succeed; lose, forfeit; fail, flop; watch, observe
happen, occur; answer, reply; movie, film, picture; story, tale; actor, performer; scene, episode; plot, storyline
ending, conclusion; joke, gag; car, automobile; house, home; child, kid; man, guy; woman, lady; person, individual
friend, pal; job, work; road, street; place, location; thing, object; idea, notion; problem, trouble; question, query
error, mistake; part, piece; sort, kind; almost, nearly; often, frequently; rarely, seldom; always, constantly
quickly, rapidly; really, truly; very, extremely; completely, totally, entirely; maybe, perhaps; also, too
only, merely; enough, sufficiently; again, anew
"""
"""Sets of English words with similar meanings."""


def read(path: str) -> dict[str, list[str]]:
    """Return the synonyms of each word in lower case, the closest first.

    Args:
        path: Text file with one set of words per line, separated by commas; a folder with WordNet's files; or "" for
            the list `ENGLISH`.

    Raises:
        RequestError: If the file is missing or has no set of words.
    """
    if not path:
        return of_sets(ENGLISH.replace(";", "\n").splitlines())
    where = Path(path)
    try:
        found = wordnet(where) if where.is_dir() else of_sets(where.read_text(encoding="utf-8").splitlines())
    except (OSError, UnicodeDecodeError, ValueError, IndexError) as e:
        why = e.strerror if isinstance(e, OSError) else "it has another form"
        raise RequestError(f"synonyms: {path}: cannot be read: {why}") from None
    if not found:
        raise RequestError(f"synonyms: {path}: has no line with two words that are separated by a comma")
    return found


def of_sets(lines: Iterable[str]) -> dict[str, list[str]]:
    """Return, for each word, the other words of the sets that contain it.

    Example:
        >>> of_sets(["big, large", "large, huge"])
        {'big': ['large'], 'large': ['big', 'huge'], 'huge': ['large']}
    """
    found: dict[str, list[str]] = {}
    for line in lines:
        words = [word.strip().lower() for word in line.split(",") if word.strip()]
        for word in words:
            others = found.setdefault(word, [])
            others += [other for other in words if other != word and other not in others]
    return {word: others for word, others in found.items() if others}


def wordnet(folder: Path) -> dict[str, list[str]]:
    """Return, for each word with four or more letters, the other single words of its most frequent sense.

    WordNet lists the senses of a word by part of speech, the most frequent sense first. If a word has several parts of
    speech, the one with the most tagged senses is used.
    """
    found: dict[str, tuple[int, list[str]]] = {}
    for part in PARTS:
        data = (folder / f"data.{part}").read_bytes()
        for line in (folder / f"index.{part}").read_text(encoding="utf-8").splitlines():
            lemma, *fields = line.split()
            if line.startswith(" ") or not lemma.isalpha() or len(lemma) < 4:
                continue
            tagged, first = int(fields[4 + int(fields[2])]), int(fields[5 + int(fields[2])])
            words = data[first : data.index(b"\n", first)].decode().split()
            others = [word.split("(")[0].lower() for word in words[4 : 4 + 2 * int(words[3], 16) : 2]]
            others = [word for word in others if word.isalpha() and word != lemma]
            if lemma not in found or tagged > found[lemma][0]:
                found[lemma] = tagged, others
    return {lemma: others for lemma, (_, others) in found.items() if others}


def digest(known: dict[str, list[str]]) -> str:
    """Return the digest of synonyms."""
    return hashlib.sha256(repr(sorted(known.items())).encode()).hexdigest()
