"""Domains that the algorithms run on, each with its own pipeline, data and rewards.

A domain has `pipeline`, `data`, `rewards`, `metrics`, `samples` (what its samples are) and, where
these are no pictures already, `render`. Beside them: `networks`, `sources` (where data come from),
its science, `train` (scripts that train the embedded models) and `assets`.
"""

from lit_rlft.moved import register

_MOVED = {
    "domains.gaussian_mixture.mixture": "domains.gaussian_mixture.closed_form.mixture",
    "domains.image.distances": "lit_rlft.kit.statistics",
    "domains.image.features": "domains.image.networks.features",
    "domains.image.folder": "lit_rlft.kit.picture_folder",
    "domains.image.inception": "domains.image.networks.inception",
    "domains.image.train_features": "domains.image.train.features",
    "domains.layout.classes": "domains.layout.page.classes",
    "domains.layout.critic": "domains.layout.rewards",
    "domains.layout.encoder": "domains.layout.networks.encoder",
    "domains.layout.formats": "domains.layout.sources.formats",
    "domains.layout.grammar": "domains.layout.sources.grammar",
    "domains.layout.layouts": "domains.layout.samples",
    "domains.layout.measures": "domains.layout.page.measures",
    "domains.layout.network": "domains.layout.networks.transformer",
    "domains.layout.pages": "domains.layout.sources.packed",
    "domains.layout.streaming": "domains.layout.sources.streaming",
    "domains.layout.train_encoder": "domains.layout.train.encoder",
    "domains.molecule.batches": "lit_rlft.kit.size_batches",
    "domains.molecule.bonds": "domains.molecule.chemistry.bonds",
    "domains.molecule.coupling": "domains.molecule.networks.coupling",
    "domains.molecule.descriptors": "domains.molecule.chemistry.descriptors",
    "domains.molecule.edm": "domains.molecule.networks.edm",
    "domains.molecule.elements": "domains.molecule.chemistry.elements",
    "domains.molecule.enumeration": "domains.molecule.sources.enumeration",
    "domains.molecule.formats": "domains.molecule.sources.formats",
    "domains.molecule.geometry": "domains.molecule.chemistry.geometry",
    "domains.molecule.graphs": "domains.molecule.chemistry.graphs",
    "domains.molecule.make_data": "domains.molecule.train.make_data",
    "domains.molecule.molecules": "domains.molecule.samples",
    "domains.molecule.network": "domains.molecule.networks",
    "domains.molecule.preconditioning": "domains.molecule.networks.preconditioning",
    "domains.molecule.processes": "domains.molecule.chemistry.workers",
    "domains.molecule.structures": "domains.molecule.sources.packed",
    "domains.text_to_image.clip": "domains.text_to_image.networks.clip",
    "domains.text_to_image.jpeg": "domains.text_to_image.rewards.jpeg_size",
    "domains.text_to_image.shapes.make_tokenizer": "domains.text_to_image.train.make_tokenizer",
    "domains.text_to_image.shapes.train_autoencoder": "domains.text_to_image.train.autoencoder",
    "domains.text_to_image.shapes.train_classifier": "domains.text_to_image.train.classifier",
    "domains.text_to_image.shapes.train_clip": "domains.text_to_image.train.clip",
    "domains.text_to_image.shapes.training": "domains.text_to_image.train.common",
    "domains.text_to_image.shapes_classifier": "domains.text_to_image.rewards.shapes",
}
"""New module by that of 0.1.0, which works for one more release."""

_RENAMED = {
    "domains.molecule.network": {"Denoiser": "MoleculeNetwork"},
    "domains.molecule.processes": {"in_processes": "in_workers"},
}
"""By module of 0.1.0: new name by old one."""

register(_MOVED, _RENAMED)
