"""The command that prints what a bug report needs: env."""

from anybatch.cli.app import app


@app.command()
def env() -> None:
    """Print versions, devices, threads and libraries: what a bug report needs."""
    from anybatch.lab.environment import environment

    for name, value in environment().items():
        print(f"{name}: {value}")
