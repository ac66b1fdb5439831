"""``python -m flashx.info`` prints flashx.build_info()."""

from __future__ import annotations

from .version import build_info


def main() -> None:
    for name, value in build_info().items():
        print(f"{name:12} {', '.join(value) or '-' if isinstance(value, list) else value}")


if __name__ == "__main__":
    main()
