"""Stand-in for tabulate."""


def tabulate(rows, headers=(), **options):
    """Never called by the tests."""
    return "\n".join(" ".join(map(str, row)) for row in rows)
