import sys

try:
    from kvshare.cli.main import main
except ModuleNotFoundError as error:
    print(f"kvshare: package {error.name} is missing from {sys.executable}: pip install -e .", file=sys.stderr)
    sys.exit(2)
main()
