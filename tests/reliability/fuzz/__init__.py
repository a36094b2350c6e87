"""Random bytes at every door through which files of others come in: only `ArtifactError` may come out.

`plain` needs nothing but Python; ``python -m tests.reliability.fuzz`` is the same target under atheris, which coverage
leads. Nothing is imported here: atheris has to see the package's modules before anything else imports them.
"""
