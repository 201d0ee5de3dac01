import argparse
import sys

from benchmarks import real
from benchmarks.real.packages import Unavailable
from benchmarks.real.weights import folder_of

parser = argparse.ArgumentParser(description=real.__doc__, formatter_class=argparse.RawTextHelpFormatter)
parser.add_argument("models", nargs="*", metavar="MODEL", help=f"one of {', '.join(real.MODELS)}; all by default")
asked = parser.parse_args().models or list(real.MODELS)
if unknown := [name for name in asked if name not in real.MODELS]:
    parser.error(f"{unknown[0]} is none of {', '.join(real.MODELS)}")
for name in asked:
    try:
        print(folder_of(real.MODELS[name]))
    except Unavailable as error:
        print(error, file=sys.stderr)
        sys.exit(2)
