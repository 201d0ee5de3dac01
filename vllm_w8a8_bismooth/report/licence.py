"""Licences as the Hub names them, and those that a folder's own text shows beyond doubt."""

import hashlib
import re
from pathlib import Path

HUB = frozenset(
    """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m bigscience-bloom-rail-1.0
    bigscience-openrail-m bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5
    cc-by-3.0 cc-by-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0
    cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0 epl-2.0 etalab-2.0
    eupl-1.1 eupl-1.2 fair-noncommercial-research-license gemma gfdl gpl gpl-2.0 gpl-3.0 grok2-community h-research
    intel-research isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 lppl-1.3c mit
    mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openmdw-1.0 openmdw-1.1 openrail openrail++ osl-3.0 other pddl postgresql
    unknown unlicense wtfpl zlib
    """.split()  # noqa: SIM905 (a line a name would be as long as the rest of the module)
)
"""The ids of https://huggingface.co/docs/hub/repositories-licenses; the Hub refuses a card with any other."""

_LIMIT = 2**16  # bytes; the texts that are known are shorter
_NAMES = re.compile(r"(licen[cs]e|copying)([^a-z].*)?", re.IGNORECASE)
_SPDX = re.compile(r"\W*SPDX-License-Identifier:\s*([\w.+-]+)\W*", re.IGNORECASE)
_GNU = re.compile(r"([al]?gpl-[0-9.]+)(?:-only|-or-later)|(l?gpl-[0-9.]+)\+")
"""The only licences of the Hub that SPDX has in such forms, beside the GFDL; the form with a plus is its older one."""
_GFDL = re.compile(r"gfdl-1\.[123](-(no-)?invariants)?(-only|-or-later)?")
_OWNER = re.compile(r"\W*copyright\b.{0,120}", re.IGNORECASE)
_CONDITION = re.compile(r"licen|only|commerc|use\b|used\b|permi|restrict|prohibit|subject|terms", re.IGNORECASE)
_MIT_TITLE = re.compile(r"^(the )?mit license (mit )?")
_TEXTS = {
    "47a1779109285b36ef3957620cb0b4a353dbde743fd3d8635a57a08d4147dc90": "apache-2.0",
    "b0a337fdff246094cbb20be5c1d3509f4cb330db8aac9b04ff35cd5c18b26b96": "apache-2.0",  # with https
    "30d830a1c629e349056cd05119af2d0607cea571fd6aa391332c202a939ce8b7": "apache-2.0",  # without its appendix
    "36b09344024c296f4efe320c4dd6cfef7169b068e7e5ec53c68a754365e4ffdf": "mit",
}
"""SHA-256 of a licence's words -> its id."""


def hub_id(name: str) -> str | None:
    """The Hub's id of a licence named by that id or by its SPDX identifier; ``None`` for a name that is neither.

    The Hub does not tell GPL-3.0-only from GPL-3.0-or-later: both are ``gpl-3.0`` there.
    """
    found = name.lower()
    if match := _GNU.fullmatch(found):
        found = match[1] or match[2]
    elif _GFDL.fullmatch(found):
        found = "gfdl"
    return found if found in HUB else None


def recognised(folder: Path) -> str | None:
    """The Hub's id of the licence whose text a folder holds; ``None`` where there is any doubt.

    There must be one file of a licence, and its words must be those of Apache-2.0 or of MIT, all of them and no
    others, but for lines that name the owner. A file of nothing but an SPDX identifier also counts. A known title is
    not enough: many licences are another one's text with a condition added.
    """
    found = [path for path in folder.iterdir() if _NAMES.fullmatch(path.name)]
    if len(found) != 1 or not found[0].is_file() or found[0].stat().st_size > _LIMIT:
        return None
    lines = found[0].read_bytes().decode("utf-8-sig", errors="replace").splitlines()
    named = [match[1] for line in lines if (match := _SPDX.fullmatch(line))]
    kept = [
        line
        for line in lines
        if not _SPDX.fullmatch(line) and not (_OWNER.fullmatch(line) and not _CONDITION.search(line))
    ]
    words = " ".join(re.sub(r"[^a-z0-9.]+", " ", "\n".join(kept).lower()).split())
    by_text = _TEXTS.get(hashlib.sha256(_MIT_TITLE.sub("", words, count=1).encode()).hexdigest())
    by_name = hub_id(named[0]) if len(named) == 1 else None
    if named and by_name is None:
        return None
    if not words:
        return by_name
    return by_text if by_name in (None, by_text) else None
