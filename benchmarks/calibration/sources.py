"""Where the bundled calibration text is from: pinned releases and commits, their licences, and how much of each."""

from dataclasses import dataclass

CHAT, CODE, MATHS, OTHER, PROSE = "chat", "code", "maths", "other languages", "prose"


@dataclass(frozen=True)
class Source:
    """One project at one version.

    Attributes:
        name: of the source distribution on PyPI, or ``owner/name`` on GitHub.
        version: the release, or the commit.
        sha256: of the source distribution; ``None`` for a repository.
        license: in SPDX.
        terms: file with the licence's text; ``None`` where it is this package's own LICENSE.
        note: what a reader of the licences should know besides.
    """

    name: str
    version: str
    sha256: str | None
    license: str
    terms: str | None
    note: str = ""

    @property
    def address(self) -> str:
        """Where people find it."""
        if self.sha256 is None:
            return f"https://github.com/{self.name}/tree/{self.version}"
        return f"the source distribution of {self.name} {self.version} on the Python package index"


@dataclass(frozen=True)
class Take:
    """Some files of a source.

    Attributes:
        source: its name.
        files: a regular expression for their whole paths.
        language: of the text, as in BCP 47, or of the program.
        kind: one of the five above.
        characters: how many are taken, about.
        begin: a regular expression at which the text begins, for books with a title and a preface.
    """

    source: str
    files: str
    language: str
    kind: str
    characters: int
    begin: str = ""


FASTAPI, RUST, BROTLI = "fastapi/fastapi", "rust-lang/book", "google/brotli"
LANG, OWN = "googlefonts/lang", "vllm-w8a8-bismooth"
SOURCES = (
    Source(
        "Django",
        "5.2",
        "1a47f7a7a3d43ce64570d350e008d2949abe8c7e21737b351b6a1611277c6d89",
        "BSD-3-Clause",
        "Django-5.2/LICENSE",
    ),
    Source(
        "flask",
        "3.1.3",
        "0ef0e52b8a9cd932855379197dd8f94047b359ca0a78695144304cb45f87c9eb",
        "BSD-3-Clause",
        "flask-3.1.3/LICENSE.txt",
    ),
    Source(
        "sympy",
        "1.14.0",
        "d3d3fe8df1e5a0b42f0e7bdf50541697dbe7d23746e894990c030e2b05e72517",
        "BSD-3-Clause",
        "sympy-1.14.0/LICENSE",
    ),
    Source(FASTAPI, "c3f316b7e814667e8ee81e03a7330d00ee61e45c", None, "MIT", "LICENSE"),
    Source(
        RUST,
        "917544888a55e4da7109bdba8c88c893c0da70f4",
        None,
        "MIT",
        "LICENSE-MIT",
        "The book is offered under MIT or Apache-2.0; it is taken under MIT.",
    ),
    Source(
        BROTLI,
        "8e10eeb3378f6c459dbaf033ca6727e9816afccb",
        None,
        "MIT",
        "LICENSE",
        "Of its test data: Lewis Carroll, Alice's Adventures in Wonderland; William Shakespeare, As You Like It; John "
        "Milton, Paradise Lost. All three are in the public domain.",
    ),
    Source("expressjs/express", "a3714473feb3d2908add734d340e7755fd85e0a3", None, "MIT", "LICENSE"),
    Source("DaveGamble/cJSON", "a29814f285cc531c00223743ad3c55cd38c0dc56", None, "MIT", "LICENSE"),
    Source("gin-gonic/gin", "dcaa4296d111981ffb31ac3eba90bb63e1eb5ab9", None, "MIT", "LICENSE"),
    Source("nvm-sh/nvm", "b17550a0b9ab691439815dfccc8b73e3a59fa103", None, "MIT", "LICENSE.md"),
    Source(
        LANG,
        "84b091844c76bc4555e52f3bbd9fe5a9767d23ef",
        None,
        "Apache-2.0",
        None,
        "Passages of the Universal Declaration of Human Rights, which is in the public domain, as that project "
        "transcribes them. It has no NOTICE file.",
    ),
    Source(
        OWN, "this version", None, "Apache-2.0", None, "Chats, prose, problems and programs written for this package."
    ),
)

_DOCS = (
    r"docs/{}/docs/(tutorial|advanced|how-to|deployment|about)/.*\.md|docs/{}/docs/(async|alternatives|features)\.md"
)
_TRANSLATIONS = {
    "de": ("de", 6500),
    "es": ("es", 6500),
    "fr": ("fr", 6500),
    "pt": ("pt", 6500),
    "ru": ("ru", 6500),
    "tr": ("tr", 6000),
    "uk": ("uk", 6000),
    "ja": ("ja", 5000),
    "ko": ("ko", 5000),
    "zh": ("zh", 5000),
    "zh-hant": ("zh-Hant", 2000),
    "hi": ("hi", 2500),
}
_DECLARATIONS = (
    "ar_Arab", "bg_Cyrl", "bn_Beng", "cs_Latn", "da_Latn", "el_Grek", "fa_Arab", "fi_Latn", "he_Hebr", "hu_Latn",
    "id_Latn", "it_Latn", "ja_Jpan", "ka_Geor", "ko_Kore", "nl_Latn", "pl_Latn", "ro_Latn", "sv_Latn", "sw_Latn",
    "th_Thai", "vi_Latn", "zh_Hans",
)  # fmt: skip

TAKES = (
    Take(BROTLI, r"tests/testdata/alice29\.txt", "en", PROSE, 27000, r"  Alice was beginning"),
    Take(BROTLI, r"tests/testdata/asyoulik\.txt", "en", PROSE, 12000, r"ORLANDO\tAs I remember"),
    Take(BROTLI, r"tests/testdata/plrabn12\.txt", "en", PROSE, 12000, r"Of Man's first disobedience"),
    Take(RUST, r"src/ch(0[1-9]|1\d)-.*\.md", "en", PROSE, 29000),
    Take("Django", r"Django-5\.2/docs/(topics|intro|misc|faq|internals)/.*\.txt", "en", PROSE, 29000),
    Take("flask", r"flask-3\.1\.3/docs/.*\.rst", "en", PROSE, 12000),
    Take(FASTAPI, _DOCS.format("en", "en"), "en", PROSE, 11000),
    *(
        Take(FASTAPI, _DOCS.format(folder, folder), language, OTHER, size)
        for folder, (language, size) in _TRANSLATIONS.items()
    ),
    *(
        Take(LANG, rf"Lib/gflanguages/data/languages/{name}\.textproto", name.partition("_")[0], OTHER, 900)
        for name in _DECLARATIONS
    ),
    Take("flask", r"flask-3\.1\.3/src/flask/.*\.py", "python", CODE, 10000),
    Take("Django", r"Django-5\.2/django/(db/models|forms|views|contrib/auth)/.*\.py", "python", CODE, 9000),
    Take("Django", r"Django-5\.2/django/contrib/admin/static/admin/js/[a-zA-Z_]*\.js", "javascript", CODE, 7000),
    Take("Django", r"Django-5\.2/django/contrib/admin/templates/admin/.*\.html", "html", CODE, 3000),
    Take("Django", r"Django-5\.2/django/contrib/admin/static/admin/css/[a-z]*\.css", "css", CODE, 1500),
    Take("expressjs/express", r"(lib|examples)/.*\.js", "javascript", CODE, 8000),
    Take("DaveGamble/cJSON", r"cJSON(_Utils)?\.[ch]", "c", CODE, 6000),
    Take(BROTLI, r"c/(dec|enc|common)/[a-z_]*\.c", "c", CODE, 4000),
    Take(RUST, r"listings/ch(0[5-9]|1\d|2\d)-.*/src/(main|lib)\.rs", "rust", CODE, 7000),
    Take("gin-gonic/gin", r"[a-z_]*\.go|binding/[a-z_]*\.go", "go", CODE, 6000),
    Take("nvm-sh/nvm", r"nvm\.sh|install\.sh|bash_completion", "shell", CODE, 6000),
    Take(
        "sympy",
        r"sympy-1\.14\.0/doc/src/(tutorials/intro-tutorial|guides/solving|explanation|modules/(series|stats|concrete|"
        r"integrals|polys|solvers|diffgeom|geometry))/.*\.(rst|md)",
        "en",
        MATHS,
        15000,
    ),
)
