"""The errors that a person can mend."""


class UserError(ValueError):
    """Input that cannot be used: a config, a flag, a file, a directory, an argument.

    Its message says what is wrong, where, and what would be right. The command lines show it as one
    line and end with exit code 2. Every other exception is a bug and keeps its traceback.
    """
