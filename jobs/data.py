"""``unclip data look SOURCE``, ``data search | export | retry | forget | gc | check CONFIG``."""

from __future__ import annotations

import argparse
import sys
from dataclasses import replace

from jobs.output import print_json, say
from jobs.plan import changes
from jobs.project import Project, load_as_run, open_as_run
from pipeline.build import build
from pipeline.config import Config
from pipeline.data.export import STAGES, export_pairs
from pipeline.data.fetch.references import shown
from pipeline.data.pairs.row_index import SPLITS
from pipeline.data.source.forget import Request, find
from pipeline.data.source.journal import ListJournal, change_journal, with_forgotten
from pipeline.data.source.lists import path_policy
from pipeline.data.source.retry import FINAL, gather
from pipeline.data.source.segments import SourceShard
from pipeline.data.source.stage import scan
from pipeline.errors import UserError, did_you_mean
from pipeline.graph.stages import ordered
from pipeline.ledger import DEFERRED, REASONS
from pipeline.local import read_local
from pipeline.progress import counted, duration
from pipeline.store import Store, open_store
from pipeline.upkeep.check import repair_store, verify_store
from pipeline.upkeep.collect import collect

MOST_TOLD = 20  # objects that cannot be read, which are told one by one
FILE_BYTES = 256 << 20  # of a list of what to forget


def main(arguments: argparse.Namespace) -> int:
    """Runs the command."""
    if arguments.action == "look":
        from jobs.look import main as look  # which imports torch

        return look(arguments)
    # These work on a whole store, also where the list cannot be opened.
    if whole := {"gc": _collect, "check": _check}.get(arguments.action):
        config = load_as_run(arguments.config, arguments.overrides)
        return whole(config, open_store(config.store), arguments)
    runs = {"search": _search, "retry": _retry, "forget": _forget, "export": _export}
    return runs[arguments.action](open_as_run(arguments.config, arguments.overrides), arguments)


def _search(project: Project, arguments: argparse.Namespace) -> int:
    """Prints a line for each of the nearest rows: cosine, key, split, reference, first caption, separated by tabs."""
    from pipeline.data.neighbours.search import SEARCHED, embed_caption, embed_image, look_up

    if arguments.count < 1:
        raise UserError(f"--count {arguments.count} is below 1")
    artifacts = project.made(*SEARCHED)
    if arguments.image:
        query = embed_image(project.store, artifacts["clip"], arguments.image)
    else:
        query = embed_caption(project.store, artifacts["clip"], arguments.caption)
    splits = (arguments.split,) if arguments.split else SPLITS
    found = look_up(project.store, artifacts, query, arguments.count, splits)
    if not found:
        raise UserError(f"{arguments.config}: its index is empty; see the rejected rows in the report")
    if arguments.json:
        print_json({"rows": [replace(row, url=shown(row.url), place=None) for row in found]})
        return 0
    for row in found:
        say(f"{row.similarity:.4f}\t{row.key}\t{row.split}\t{_words(shown(row.url))}\t{_words(row.caption)}")
    return 0


def _export(project: Project, arguments: argparse.Namespace) -> int:
    made, target = project.made(*STAGES), open_store(arguments.to)
    about = project.config.project, project.config.source.paths
    counts = export_pairs(project.store, made, target, arguments.only, arguments.split, *about)
    for kind, count in counts.items():
        say(f"{target.url}/{kind}: {counted(count, 'row')}")
    return 0


def _retry(project: Project, arguments: argparse.Namespace) -> int:
    reasons = [word for word in (arguments.reason or ",".join(DEFERRED)).replace(" ", "").split(",") if word]
    for reason in reasons:
        if reason not in REASONS:
            raise UserError(f"--reason: unknown reason {reason}{did_you_mean(reason, REASONS)}")
        if reason in FINAL:
            raise UserError(f"--reason: {reason} is final: {REASONS[reason]}")
    pairs, journal = project.made("pairs")["pairs"], project.journal
    reaches = [path_policy(project.config.source, path) for path in project.config.source.paths]
    blob, rows = gather(project.store, _listed(project), pairs, frozenset(reasons), reaches)
    if blob is None:
        lost = sorted(pairs.ledger.lost.items())
        ended = ", ".join(f"{n:,} {reason}" for reason, n in lost)
        others = ",".join(reason for reason, _ in lost if reason not in {*reasons, *FINAL})
        more = f"; --reason {others} retries those" if others else ""
        say(f"no row to retry; rows of pairs that were not kept: {ended or 'none'}{more}")
        return 0

    def tried(now: ListJournal) -> ListJournal:
        if now.retries != journal.retries:
            raise UserError("another process has changed the rows to retry; nothing was changed: try again")
        return replace(now, retries=(*now.retries, blob))

    change_journal(project.store, project.config.project, tried)
    say(f"{rows:,} rows are retried in place by the next run")
    return 0


def _forget(project: Project, arguments: argparse.Namespace) -> int:
    request, config = Request.read([*arguments.what, *_lines(arguments.file)]), arguments.config
    if not (request.keys or request.hashes or request.references):
        raise UserError("nothing to forget: give keys, references or hashes, or --file")
    before = project.plan()
    if request.keys and not any(v.stage == "pairs" and v.state == "fresh" for v in before):
        raise UserError(
            "keys refer to the list as it was fetched, but it has changed since or was never fetched: name "
            f"references, or unclip run {config} --until pairs and look for the rows again"
        )
    pairs = project.made("pairs")["pairs"] if request.hashes else None
    found = find(project.store, _listed(project), pairs, request)
    change_journal(project.store, project.config.project, lambda journal: with_forgotten(journal, found.marks))
    say(f"{found.rows:,} rows are forgotten")
    for key, reference in found.named:
        say(f"  {key} {_words(shown(reference))}")
    if found.rows > len(found.named):
        say(f"  and {found.rows - len(found.named):,} more")
    if found.unseen:
        say(f"{len(found.unseen):,} references are not in the list yet, such as {shown(found.unseen[0])}")
    after = open_as_run(config, arguments.overrides)
    say(changes(before, after.plan()))
    say(
        f"unclip run {config} makes what is stale again; then unclip data gc {config} --yes deletes what was made with "
        "them. Pinned artefacts stay, although made with them: unclip unpin makes them stale"
    )
    return 0


def _collect(_: Config, store: Store, arguments: argparse.Namespace) -> int:
    for name, value in (("--keep-days", arguments.keep_days), ("--grace-hours", arguments.grace_hours)):
        if not value >= 0:
            raise UserError(f"{name} {value:g} is below 0")
    keep_s, grace_s = arguments.keep_days * 86_400, arguments.grace_hours * 3600
    found = collect(store, keep_s, grace_s, store.now(), arguments.yes)
    if arguments.json:
        print_json(vars(found))
        return 1 if found.unreadable else 0
    say(f"{'':12}{'needed':>16}{'garbage':>26}{'deleted':>26}")
    for kind in sorted(found.needed.keys() | found.garbage.keys()):
        tallies = (found.needed[kind], found.garbage[kind], found.deleted[kind])
        say(f"{kind:12}" + "".join(f"{t.objects:>12,} {t.size / 2**20:>9,.1f} MiB" for t in tallies))
    if found.abandoned:
        say(f"{found.abandoned:,} half-written objects of killed writers are deleted")
    if not arguments.yes:
        say("nothing is deleted without --yes")
    elif any(tally.objects for tally in found.garbage.values()):
        say(f"garbage is deleted by the first gc at least {duration(grace_s)} after the one that found it")
    if not found.unreadable:
        return 0
    for path, why in sorted(found.unreadable.items())[:MOST_TOLD]:
        say(f"{store.url}/{path} {why}")
    say(
        f"{counted(len(found.unreadable), 'object')} could not be read; everything that may depend on them is kept: "
        "repair them as described above, then run unclip data gc again"
    )
    return 1


def _check(config: Config, store: Store, arguments: argparse.Namespace) -> int:
    """Prints each damaged object with what names it and what is made again, and a table. Returns 1 where any stays."""
    names = [name.removeprefix(f"{store.url}/") for name in arguments.names]
    verify = repair_store if arguments.repair else verify_store
    found = verify(store, config.project, arguments.keep_days * 86_400, names)
    bad = [damage for damage in found.damage if damage.stays or not arguments.repair]
    if arguments.json:
        print_json({"records": found.records, "blobs": len(found.blobs), "size": found.size, "damage": found.damage})
        return 1 if bad else 0
    for damage in found.damage[:MOST_TOLD]:
        by = f", and {counted(len(damage.records), 'record')} that name it" if damage.records else ""
        end = damage.stays or f"{'quarantined' if arguments.repair else 'to be quarantined'}{by}"
        say(f"{store.url}/{damage.path} {damage.why}: {end}")
    blobs = sum(damage.path.startswith("blobs/") for damage in found.damage)
    say(f"{'':10}{'sound':>12}{'MiB':>12}{'damaged':>10}")
    say(f"{'records':10}{found.records:>12,}{'':12}{len(found.damage) - blobs:>10,}")
    say(f"{'blobs':10}{len(found.blobs):>12,}{found.size / 2**20:>12,.1f}{blobs:>10,}")
    lost = {stage for damage in found.damage if not damage.stays for stage in damage.stages}
    if lost:
        behind = set(lost)
        for stage in ordered(build(config)):
            behind |= {stage.name} if behind.intersection(stage.inputs) else set()
        kept = f"; {', '.join(sorted(behind - lost))} stay, which were made from it" if behind - lost else ""
        say(f"the next run remakes what is lost of {', '.join(sorted(lost))}{kept}")
    if found.damage and not arguments.repair:
        say(f"nothing is changed without --repair: unclip data check {arguments.config} --repair")
    return 1 if bad else 0


def _listed(project: Project) -> list[SourceShard]:
    """Stores the list, and returns its shards. Raises UserError if it has changed since it was opened."""
    found = scan(
        project.config.source, project.store, write=True, journal=project.journal, project=project.config.project
    )
    if found.keys != project.scan.keys:
        raise UserError("the list has changed meanwhile; nothing is written: run the command again")
    return found.shards


def _words(text: str) -> str:
    """Returns text on one line, whatever is in it."""
    return " ".join(text.split())


def _lines(path: str | None) -> list[str]:
    if path is None:
        return []
    try:
        text = sys.stdin.read() if path == "-" else read_local(path, FILE_BYTES).decode()
        return text.removeprefix("\ufeff").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        why = getattr(e, "strerror", None) or e
        raise UserError(
            f"--file {path}: cannot be read ({why}); give a UTF-8 text file, or - for standard input"
        ) from None
