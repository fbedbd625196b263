"""`python -m korora`, and the entry point of the `korora` script."""


def main() -> None:
    """Run the command line."""
    from korora.cli.main import main as run

    run()


if __name__ == "__main__":
    main()
