"""The errors that are meant for the person who started the program."""


class UserError(ValueError):
    """A mistake that the user can put right: one line with the value, the bound and the way out.

    The command line prints the message alone, without a traceback, and ends with exit status 2.
    """
