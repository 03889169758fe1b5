"""An audit as people read it: names of models and rows are a stranger's, so `say` lets nothing in them be obeyed."""

from common.terminal import say
from common.untrusted import one_line
from precompute.audit.agreement import TOPK_SHARE, Agreement, Offset
from precompute.audit.run import Audit, Verdict


def show(audit: Audit, worst: int) -> None:
    """The whole result for people.

    Args:
        worst: how many of the worst rows to list for each column.
    """
    tokens = audit.columns[0].found.scored
    say(
        f"{audit.url}: {audit.rows:,} of {audit.of_rows:,} rows (seed {audit.seed}), {tokens:,} completion tokens, "
        f"against a forward pass of transformers in {audit.dtype} on {audit.device}"
    )
    for verdict in audit.columns:
        say("")
        for line in _column(verdict, worst):
            say(line)
        for fault in verdict.faults:
            say(f"  FAILED: {fault}", "red")
        if not verdict.faults:
            say("  OK", "green")
    for column, why in audit.skipped.items():
        say("")
        say(f"{column}: not audited, {why}")
    say("")
    say("OK" if audit.passed else "FAILED", "green" if audit.passed else "red")


def _column(verdict: Verdict, worst: int) -> list[str]:
    found, limits = verdict.found, verdict.limits
    return [
        f"{verdict.column} of {verdict.model}, by {verdict.engine}",
        f"  |d| in nats           mean {found.here.mean:.2g}, p99 {found.p99:.2g}, max {found.largest:.2g} "
        f"(row {found.uid}, position {found.position}, token {found.token}); mean d {found.signed:+.1g}",
        f"  correlation           {_correlation(found.here)}",
        f"  shifted by one token  earlier: mean |d| {found.before.mean:.2g}, correlation {_correlation(found.before)}; "
        f"later: {found.after.mean:.2g}, {_correlation(found.after)}",
        *_cut(found),
        *_topk(found),
        f"  limits                mean {limits.mean:g}, max {limits.largest:g} (for {verdict.limits_of})",
        *_worst(found, worst),
    ]


def _cut(found: Agreement) -> list[str]:
    if not found.blurred and not found.outside:
        return []
    share = found.blurred / found.scored
    return [
        f"  cut-off               {found.blurred:,} tokens ({share:.1%}) left out, their edge of top-p, top-k or "
        f"min-p is unsure; {found.outside:,} beyond it"
    ]


def _topk(found: Agreement) -> list[str]:
    if found.topk is None:
        return []
    topk, said = found.topk, []
    if topk.mean is not None:
        said.append(f"mean |d| {topk.mean:.2g} (limit x{TOPK_SHARE:g}), max {topk.largest:.2g}")
    if topk.shortfall is None:
        said.append("they are the most likely ids of the student")
    else:
        said.append(
            f"the least likely is at most {max(topk.shortfall, 0):.2g} nats below the last of the recomputed ones"
        )
    return [f"  top {topk.k:<18}{'; '.join(said)}"]


def _worst(found: Agreement, worst: int) -> list[str]:
    rows = [(one_line(row.uid), row) for row in found.by_row[:worst]]
    if not rows:
        return []
    width = max(3, *(len(uid) for uid, _ in rows))
    head = f"  {'row':<{width}}  {'tokens':>6}  {'mean |d|':>9}  {'max |d|':>9}"
    return [
        head,
        *(f"  {uid:<{width}}  {row.tokens:>6}  {row.mean:>9.2g}  {row.largest:>9.2g}" for uid, row in rows),
    ]


def _correlation(offset: Offset) -> str:
    return "undefined" if offset.correlation is None else f"{offset.correlation:.4f}"
