"""``unclip release COMMAND CONFIG``: move, compare, measure or use the current release."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from jobs.bundles import remember_bundle
from jobs.output import print_json, say, warn
from jobs.project import Project, load_as_run, project_of
from models.sampling_config import MODELS
from pipeline.config import Config
from pipeline.errors import UserError
from pipeline.evaluate.figure import difference, short
from pipeline.graph.artifacts import Artifact, load_artifact
from pipeline.graph.execute import make_context
from pipeline.graph.stages import stage_key
from pipeline.release.compare import (
    Change,
    EvaluatedBundle,
    changes,
    evaluations,
    find_comparable,
    load_measured,
    obstacles,
    same_clip,
)
from pipeline.release.diff import data_changes, find_bundle, recipes_changed, stages_behind
from pipeline.release.gates import failing, unjudged
from pipeline.release.pointer import Move, Releases, move_release, read_releases
from pipeline.release.signing import (
    Untrusted,
    check_signed,
    files_of,
    find_release,
    is_signed,
    public_line,
    read_private_key,
    signed,
)
from pipeline.store import Store, open_store


@dataclass(frozen=True)
class ReleaseProject:
    """A project with its releases; its list is read only by commands that need it."""

    path: str
    config: Config
    store: Store
    releases: Releases

    def project(self) -> Project:
        return project_of(self.config, self.store)

    @property
    def name(self) -> str:
        return self.config.project

    @property
    def keys(self) -> tuple[str, ...]:
        """Returns the public keys that may sign; empty where signatures are not checked."""
        return self.config.release.keys

    def find_release(self) -> Artifact:
        """Returns the bundle of the release. Raises UserError, also for one without the signature that it needs."""
        return find_release(self.store, self.name, self.releases, self.keys)

    def check_stored(self, bundle: str) -> None:
        """Raises UserError if the store has no bundle of this key any more."""
        if load_artifact(self.store, "bundle", bundle) is None:
            raise UserError(f"{self.name}: bundle {bundle[:12]} is no longer in {self.store.url}; promote another")

    def signed(self, place: int) -> bool:
        """Returns whether a key that may sign has signed the move at a place, or no signature is asked for."""
        return not self.keys or is_signed(self.name, self.releases.moves[: place + 1], self.keys)

    def signer(self, file: str | None) -> Ed25519PrivateKey | None:
        """Returns the private key in a file. Raises UserError for one that may not sign, and where one is needed."""
        if file is None:
            if self.keys:
                raise UserError(f"{self.name}: release.keys asks for a signature; name a private key with --key FILE")
            return None
        key = read_private_key(file)
        if self.keys and public_line(key) not in [" ".join(known.split()[:2]) for known in self.keys]:
            raise UserError(f"{file}: is not among release.keys; add its line there: {public_line(key)}")
        return key

    def move(self, move: Move, signer: Ed25519PrivateKey | None) -> None:
        """Moves the release, with a signature if there is a key. Raises UserError if another process was first."""
        if signer is not None:
            move = signed(self.name, self.releases, move, signer)
        move_release(self.store, self.name, self.releases, move)
        if signer is not None and not self.keys:
            say(f'{self.name}: to have signatures checked, write release: {{keys: ["{public_line(signer)}"]}}')


def main(arguments: argparse.Namespace) -> int:
    """Runs one of the commands."""
    config = load_as_run(arguments.config, arguments.overrides)
    store = open_store(config.store)
    asked = ReleaseProject(arguments.config, config, store, read_releases(store, config.project))
    return RUNS[arguments.action](asked, arguments)


def _promote(asked: ReleaseProject, arguments: argparse.Namespace) -> int:
    if arguments.force is not None and not arguments.force.strip():
        raise UserError("--force needs a reason, which is recorded")
    signer = asked.signer(arguments.key)
    made = asked.project().made("bundle", "evaluation")
    key, current = made["bundle"].key, asked.releases.current
    again = current is not None and current.bundle == key
    # Promoted again with a key that has not signed it yet, a release only gains that signature.
    if again and (signer is None or _holds(asked, made["bundle"], [public_line(signer)])):
        say(f"{asked.name}: {key[:12]} is the release already")
        return 0
    failed, unknown = _judged(asked, made["evaluation"]) if current is not None and not again else ([], [])
    for line in (*failed, *(f"not judged: {line}" for line in unknown)):
        say(f"  {line}")
    if failed and arguments.force is None:
        warn(
            f"error: {key[:12]} is not promoted, see above; unclip release diff {asked.path} shows all figures, "
            "--force REASON promotes it anyway"
        )
        return 1
    files, reason = files_of(made["bundle"]), arguments.force or ""
    move = Move("promote", key, made["evaluation"].key, time.time(), reason, tuple(failed), files)
    asked.move(move, signer)
    was = f", which was {current.bundle[:12]}" if current is not None else ""
    say(f"{asked.name}: {key[:12]} is the release{was}")
    return 0


def _holds(asked: ReleaseProject, bundle: Artifact, keys: Sequence[str]) -> bool:
    """Returns whether a bundle is the release, with the files that it has now and signatures by one of ``keys``."""
    try:
        check_signed(asked.store, asked.name, asked.releases, keys)
    except Untrusted:
        return False
    return asked.releases.current is not None and asked.releases.current.files == files_of(bundle)


def _judged(asked: ReleaseProject, evaluation: Artifact) -> tuple[list[str], list[str]]:
    """Returns lines for gates that fail against the current release, and for claims that no gate could judge."""
    assert asked.releases.current is not None
    new = load_measured(asked.store, evaluation)
    if new is None:
        raise UserError(f"{asked.name}: its evaluation was damaged; unclip run {asked.path} makes it again")
    old, why = _against(asked, asked.releases.current.bundle, new)
    if old is None:
        return [f"cannot be compared with the release: {why}"], []
    compared = (asked.config.release, old.figures, new.figures, changes(old, new))
    return failing(*compared), unjudged(*compared)


def _against(asked: ReleaseProject, bundle: str, new: EvaluatedBundle) -> tuple[EvaluatedBundle | None, str]:
    """Returns the evaluation of a bundle that is comparable with ``new``, or why none is and what to do."""
    found = evaluations(asked.store, bundle)
    old = find_comparable(found, new)
    if old is not None:
        return old, ""
    advice = f"unclip release evaluate {asked.path} measures the release as this configuration measures"
    if not found:
        return None, f"{bundle[:12]} has no evaluation in {asked.store.url}; {advice}"
    if not same_clip(found[0].bundle, new.bundle):
        advice = "figures by one CLIP cannot be compared with those by another"
    return None, f"{', '.join(obstacles(found[0], new))}; {advice}"


def _rollback(asked: ReleaseProject, arguments: argparse.Namespace) -> int:
    signer, current, previous = asked.signer(arguments.key), asked.releases.current, asked.releases.previous
    if current is None or previous is None:
        raise UserError(
            f"{asked.name}: no release exists before {'this one' if current else 'the first'} to go back to"
        )
    asked.check_stored(previous.bundle)
    if not asked.signed(asked.releases.places[-2]):
        raise UserError(
            f"{asked.name}: {previous.bundle[:12]} was promoted without a signature of release.keys; promote it again "
            "with its configuration and --key FILE"
        )
    move = Move("rollback", previous.bundle, previous.evaluation, time.time(), arguments.reason, (), previous.files)
    asked.move(move, signer)
    say(f"{asked.name}: {previous.bundle[:12]} is the release again, which was {current.bundle[:12]}")
    return 0


def _list(asked: ReleaseProject, arguments: argparse.Namespace) -> int:
    current = asked.releases.current
    if arguments.json:
        release = None if current is None else current.bundle
        print_json({"project": asked.name, "release": release, "moves": asked.releases.moves})
        return 0
    if current is None:
        say(f"{asked.name}: nothing has been released")
        return 0
    say(f"{asked.name}: {current.bundle} is the release")
    for place, move in enumerate(asked.releases.moves):
        when = time.strftime("%Y-%m-%d %H:%M", time.gmtime(move.at))
        say(f"  {when} UTC  {move.action:9}{move.bundle[:12]}  {move.reason}".rstrip())
        for line in move.failed:
            say(f"{'':22}in spite of: {line}")
        if not asked.signed(place):
            say(f"{'':22}not signed by one of release.keys")
    return 0


def _diff(asked: ReleaseProject, arguments: argparse.Namespace) -> int:
    old, new = (_named(asked, name) for name in (arguments.first, arguments.second))
    then, now = stages_behind(asked.store, old), stages_behind(asked.store, new)
    differs = {"data": data_changes(then, now), "recipe": recipes_changed(then, now)}
    found, why = None, f"{new.key[:12]} has no evaluation in {asked.store.url}"
    for measure in evaluations(asked.store, new.key):
        before, why = _against(asked, old.key, measure)
        if before is not None:
            found = changes(before, measure)
            break
    if arguments.json:
        figures = [asdict(change) | {"verdict": change.verdict} for change in found or ()]
        reason = None if found is not None else why
        print_json({"old": old.key, "new": new.key, **differs, "figures": figures, "not_compared": reason})
        return 0
    say(f"{old.key[:12]} -> {new.key[:12]}")
    for title, lines in differs.items():
        say(title)
        say("\n".join(f"  {line}" for line in lines or ["the same"]))
    say("figures on the same held-out rows: the difference, with its 95% interval")
    if found is None:
        say(f"  not compared: {why}")
    else:
        _print_changes(found)
    return 0


def _named(asked: ReleaseProject, name: str) -> Artifact:
    if name == "own":
        return asked.project().made("bundle")["bundle"]
    return find_bundle(asked.store, asked.releases, name)


def _print_changes(found: Sequence[Change]) -> None:
    width = max((len(f"{change.model} {change.name}") for change in found), default=0)
    for change in found:
        said = difference(change.now, change.then, change.interval)
        values = f"{short(change.then):>9} -> {short(change.now):<9}"
        say(f"  {f'{change.model} {change.name}':{width}} {values} {said:30} {change.verdict}".rstrip())


def _evaluate(asked: ReleaseProject, arguments: argparse.Namespace) -> int:
    """Measures the release as the configuration's own bundle is measured, on its rows."""
    project, current = asked.project(), asked.releases.current
    if current is None:
        raise UserError(f"{asked.name}: nothing has been released yet")
    asked.check_stored(current.bundle)
    bundle = asked.find_release()
    stage = project.graph["evaluation"]
    inputs = project.made("clip", *(name for name in stage.inputs if name != bundle.stage)) | {bundle.stage: bundle}
    if inputs["clip"].key != bundle.inputs.get("clip"):
        raise UserError(
            f"{asked.name}: the release uses another CLIP than {asked.path}, so their figures cannot be compared"
        )
    key = stage_key(stage, {name: made.key for name, made in inputs.items()})
    if load_artifact(asked.store, stage.name, key) is None:
        stage.run(make_context(stage, key, inputs, asked.store, asked.config))
    say(f"{asked.name}: the release {bundle.key[:12]} is measured on the rows of {asked.path}")
    return 0


def _take(asked: ReleaseProject, arguments: argparse.Namespace) -> int:
    bundle = asked.find_release()
    remember_bundle(Path(arguments.folder), asked.store.url, bundle.key, files_of(bundle) if asked.keys else "")
    say(f'{arguments.folder}: unclip sample --from {arguments.folder} "CAPTION" draws with {bundle.key[:12]}')
    return 0


def _weights(asked: ReleaseProject, arguments: argparse.Namespace) -> int:
    """Prints, as YAML, how a configuration begins with the release's weights; CLIP is left out, as it is pinned."""
    bundle, keys = asked.find_release(), {v.stage: v.key for v in asked.project().plan()}
    for name in MODELS:
        blob = bundle.blobs.get(f"{name}/model.safetensors")
        if name == "ar_prior" and blob and bundle.inputs["codec"] != keys.get("codec"):
            say(f"# not ar_prior: it predicts codes of codec {bundle.inputs['codec'][:12]}, yours is another")
        elif blob:
            say(f"{name}: {{init_from: {blob}}}")
    return 0


RUNS = {
    "promote": _promote,
    "rollback": _rollback,
    "diff": _diff,
    "list": _list,
    "evaluate": _evaluate,
    "take": _take,
    "weights": _weights,
}
