"""What went wrong with the hub, in one sentence."""

from __future__ import annotations

from ..core.errors import GraftError

LOG_IN = "log in (hf auth login, or HF_TOKEN) with a token that may do this"


def told(error: Exception, asked: str, repo: str, revision: str) -> GraftError:
    """The error to raise for one of huggingface_hub's, or of the protocol below it."""
    from huggingface_hub import constants, errors

    # a download that fails looks for files on this machine first, and what the hub had said is the cause of not finding them
    first = next((e for e in (error, error.__cause__) if isinstance(e, errors.HfHubHTTPError)), None)
    status = first.response.status_code if first is not None else None
    if isinstance(first, errors.GatedRepoError):
        return GraftError(
            asked, f"{repo} is gated: its owner allows each reader", "ask for it on its page, then log in"
        )
    if isinstance(first, errors.RevisionNotFoundError):
        return GraftError(asked, f"{repo} has no branch, tag or commit {revision!r}", "see its history on the hub")
    if isinstance(first, errors.RepositoryNotFoundError):
        found = f"no repository {repo!r} that may be seen: there is none, or it is private"
        return GraftError(asked, found, f"look at the name, and {LOG_IN}")
    if status in (401, 403):
        return GraftError(asked, f"the hub refused it ({status}): {_line(first)}", LOG_IN)
    if constants.is_offline_mode() or isinstance(error, errors.OfflineModeIsEnabled):
        found = "HF_HUB_OFFLINE is set, and it was not downloaded before (not whole, or not at this revision)"
        return GraftError(asked, found, "set HF_HUB_OFFLINE=0")
    if isinstance(error, errors.HFValidationError):
        return GraftError(asked, _line(error), "write it as NAME/REPO")
    if first is not None:
        do = "correct what it names" if status == 400 else "try again later"
        return GraftError(asked, f"the hub answered {status}: {_line(first)}", do)
    do = "try again; an upload is one commit, whole or not there at all"
    return GraftError(asked, f"the connection failed: {_line(error.__cause__ or error)}", do)


def _line(error: BaseException | None) -> str:
    said = getattr(error, "server_message", None) or str(error)
    lines = [line.strip() for line in said.splitlines() if line.strip()]
    return f"{lines[0] if lines else type(error).__name__}"[:300]
