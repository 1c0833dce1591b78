"""A blind test: pairs of pictures for people to choose from, the key to them, and what the votes say."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np

from decant.errors import refuse
from decant.maths.seeds import seed_of
from decant.metrics.interval import wilson

KEY = "blind-key.json"
CHOICES = ("left", "right", "tie")


def write_key(out: Path, most: int) -> dict[str, Any]:
    """Draw at most so many pairs, each of the teacher's picture and a student's of the same prompt and seed, and write
    ``OUT/blind-key.json``: which picture is on which side. Gives it.

    Every student at each of its steps gets as many pairs as the others, and stands as often left as right. What is
    drawn depends on the comparison's seed alone; ``page`` is another for other pictures or pairs.

    Raises:
        UserError: nothing was compared with the teacher.
    """
    document = json.loads((out / "compare.json").read_text(encoding="utf-8"))
    arms = [entry["name"] for entry in document["models"] if entry["role"] == "student"]
    if not arms:
        raise refuse("--blind", "no student", allowed="one or more", hint="--student MODEL")
    reference = document["models"][0]["name"]
    pairs = _drawn(document, reference, arms, most)
    digest = sha256(json.dumps(pairs, sort_keys=True).encode())
    for pair in pairs:
        digest.update((out / pair["left"]).read_bytes() + (out / pair["right"]).read_bytes())
    key = {"page": digest.hexdigest()[:16], "reference": reference, "pairs": pairs}
    (out / KEY).write_text(json.dumps(key, indent=1), encoding="utf-8")
    return key


def preferences(out: Path, votes: Sequence[Path]) -> dict[str, Any]:
    """How often each student was preferred to the teacher, with Wilson's interval, from one or more voters' files.

    The pair is what is counted: with several voters each pair goes to the side with more votes. Ties are told apart and
    are no part of the share: half a vote for each side would give an interval as narrow as that of as many opinions.

    Raises:
        UserError: there is no blind page, or a file is not of it, is given twice, or says what the page cannot say.
    """
    key = _key(out)
    ballots = [_ballot(file, key) for file in votes]
    if len({json.dumps(ballot, sort_keys=True) for ballot in ballots}) < len(ballots):
        raise refuse("--votes", "two files with the same votes", allowed="one file a voter", hint="leave one out")
    total: Counter[int] = Counter()
    cast = [(pair, choice) for ballot in ballots for pair, choice in ballot.items()]
    for pair, choice in cast:
        total[pair] += {"left": -1, "right": 1, "tie": 0}[choice]
    arms = list(dict.fromkeys(pair["arm"] for pair in key["pairs"]))
    chosen = [choice for _, choice in cast if choice != "tie"]
    return {
        "page": key["page"],
        "reference": key["reference"],
        "voters": len(ballots),
        "votes": len(cast),
        "pairs": len(total),
        "left": wilson(chosen.count("left"), len(chosen)).to_json() if chosen else None,
        "arms": [_preference(arm, key, total) for arm in sorted(arms)],
    }


def _drawn(document: Mapping[str, Any], reference: str, arms: Sequence[str], most: int) -> list[dict[str, Any]]:
    random = np.random.default_rng(seed_of("blind", document["seed"]))
    rows = document["pictures"]
    orders = {arm: random.permutation(len(rows)) for arm in arms}
    found = []
    for number in range(min(most, len(arms) * len(rows))):
        arm, turn = arms[number % len(arms)], number // len(arms)
        row = rows[orders[arm][turn]]
        # Every two pairs of an arm have it once on either side.
        student_left = bool(turn % 2) != bool(seed_of("side", document["seed"], arm, turn // 2) % 2)
        files = [row["models"][arm]["file"], row["models"][reference]["file"]]
        left, right = files if student_left else files[::-1]
        side = "left" if student_left else "right"
        found.append(
            {"arm": arm, "side": side, "prompt": row["caption"], "seed": row["seed"], "left": left, "right": right}
        )
    return [found[at] for at in random.permutation(len(found))]


def _key(out: Path) -> dict[str, Any]:
    try:
        return json.loads((out / KEY).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        hint = "decant compare ... --blind writes blind.html and its key"
        raise refuse("--votes", f"{out} has no {KEY}", allowed="a comparison with a blind page", hint=hint) from None


def _ballot(file: Path, key: Mapping[str, Any]) -> dict[int, str]:
    """One voter's choice by pair."""
    try:
        document = json.loads(file.read_text(encoding="utf-8-sig"))
        page = document["page"]
        votes = [(vote["pair"], vote["choice"]) for vote in document["votes"]]
    except (OSError, ValueError, KeyError, TypeError) as error:
        value = f"{file}: {type(error).__name__}"
        raise refuse("--votes", value, allowed="votes.json as the page gives it", hint="save it again") from None
    if page != key["page"]:
        hint = f"count them with the folder whose page they are of; this one's is {key['page']}"
        raise refuse("--votes", f"{file} is of page {str(page)[:40]!r}", allowed="votes of this page", hint=hint)
    known = range(len(key["pairs"]))
    for pair, choice in votes:
        if not isinstance(pair, int) or pair not in known or choice not in CHOICES:
            value = f"{file}: {choice!r} of pair {pair!r}"[:200]
            allowed = f"{', '.join(CHOICES)} of pairs 0 to {len(known) - 1}"
            raise refuse("--votes", value, allowed=allowed, hint="save it again from the page")
    if len(dict(votes)) < len(votes):
        raise refuse("--votes", f"{file} has a pair twice", allowed="one choice a pair", hint="save it again")
    return dict(votes)


def _preference(arm: str, key: Mapping[str, Any], total: Mapping[int, int]) -> dict[str, Any]:
    """Pairs won, lost and tied by an arm."""
    own = [(pair["side"], total[at]) for at, pair in enumerate(key["pairs"]) if pair["arm"] == arm and at in total]
    signs = [balance if side == "right" else -balance for side, balance in own]
    wins, losses = sum(sign > 0 for sign in signs), sum(sign < 0 for sign in signs)
    return {
        "name": arm,
        "wins": wins,
        "losses": losses,
        "ties": len(signs) - wins - losses,
        "preference": wilson(wins, wins + losses).to_json() if wins + losses else None,
    }
