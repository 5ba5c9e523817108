"`python -m ssl_notes`: the command line of `nbs/32_cli.ipynb`."
import sys
from ssl_notes.cli import main

if __name__ == '__main__': sys.exit(main())
