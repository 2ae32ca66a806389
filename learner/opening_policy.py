"""What a site looks at before it opens a model, or gives its part in opening one.

Rule: the weights and the contributors that a model names are the key's policy to judge; what it
says of this site itself is for this site to know.
"""

from __future__ import annotations

import math

from metisfl.proto import ckks
from metisfl.proto.ckks_key import PublicPart
from metisfl.proto.errors import PeerError
from metisfl.proto.model_file import ModelFile
from metisfl.proto.model_pb2 import Manifest

__all__ = ["check_own", "check_partials", "check_policy"]


def check_policy(public: PublicPart, manifest: Manifest, *, initial: bool) -> None:
    """Raise PeerError for a sum that this key's sites do not open.

    `initial`: it is a run's initial model, which one site may have made alone.
    """
    form = manifest.encryption
    if form.fingerprint != public.fingerprint:
        raise PeerError(
            f"the model is encrypted with the key {form.fingerprint.hex()}; this site has "
            f"{public.fingerprint.hex()}: put parts of one key into all keys folders"
        )
    if (form.limb_bits, form.ring_dimension) != (public.limb_bits, public.ring_dimension):
        raise PeerError(
            f"the model has limbs of {form.limb_bits} bits in rings of {form.ring_dimension}; the "
            f"key has {public.limb_bits} and {public.ring_dimension}"
        )
    if public.is_joint and (form.polynomials, form.opens) != (2, b""):
        raise PeerError(
            f"the model has {form.polynomials} polynomials, or is one of partials; under a joint "
            "key it has 2, and what opens it comes beside it"
        )
    shares = [(share.learner, share.weight) for share in form.shares]
    if strangers := [name for name, _ in shares if public.is_joint and name not in public.sites]:
        # Anybody can encrypt under a joint key: who is no site hides nobody's update.
        raise PeerError(
            f"the model names an update of {strangers[0]}, which is no site of the key; its sites "
            f"are {', '.join(public.sites)}"
        )
    total = math.fsum(weight for _, weight in shares)
    if len(shares) > public.max_learners or not ckks.weights_fit(total, public.max_learners):
        raise PeerError(
            f"the model is the sum of {len(shares)} updates with a weight of {total:.6g}; the key "
            f"is made for up to {public.max_learners}"
        )
    if initial and len(shares) <= 1:
        return
    if not shares:
        raise PeerError("the model does not say whose updates it holds; it cannot be opened")
    if problem := ckks.check_shares(shares, public.min_contributors, public.max_share):
        raise PeerError(f"the model is not opened: {problem}")


def check_own(manifest: Manifest, site: str, given: bytes) -> None:
    """Raise PeerError if the sum names another update of this site than it has given in its round.

    `given` is that update's digest, empty if there was none. It may be left out: it may have come
    too late.
    """
    for share in manifest.encryption.shares:
        if share.learner == site and share.update_digest != given:
            gave = f"the update {given.hex()}" if given else "no update"
            raise PeerError(
                f"the model is not opened: it names the update {share.update_digest.hex()} as this "
                f"site's, which gave {gave} in this round"
            )


def check_partials(
    public: PublicPart, partials: ModelFile | None, model: Manifest, model_digest: bytes
) -> None:
    """Raise PeerError unless these are the partials of all sites of a joint key, of this model."""
    if partials is None:
        raise PeerError("the model is one of a joint key, and came without its sites' partials")
    form = partials.manifest.encryption
    names = [share.learner for share in form.shares]
    if names != [*public.sites]:
        raise PeerError(
            f"the partials are those of {', '.join(names) or 'nobody'}; the sites of the key are "
            f"{', '.join(public.sites)}, and all have to give theirs"
        )
    wanted = public.partial_form(model.encryption.exponents, model_digest)
    for field in ("fingerprint", "limb_bits", "ring_dimension", "polynomials", "opens"):
        here, there = getattr(form, field), getattr(wanted, field)
        if here != there:
            shown = [v.hex() if isinstance(v, bytes) else v for v in (here, there)]
            raise PeerError(f"the partials' {field} is {shown[0]}; it must be {shown[1]}")
    if list(partials.manifest.tensors) != list(model.tensors):
        raise PeerError("the partials are those of a model with other tensors")
