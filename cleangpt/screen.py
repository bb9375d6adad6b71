"""Rich's console without its one surprise."""

from rich.console import Console

from cleangpt.output import discard


class Screen(Console):
    """A console that becomes quiet when its reader has left, where rich's own ends the process."""

    def on_broken_pipe(self) -> None:
        """Drops this and all later output."""
        self.quiet = True
        discard(self.file)
