"""Modules and public names of the domains in 0.1.0, which work for one more release."""

import importlib.util
import re
import subprocess
import sys
import warnings

import pytest

NAMES = """
gaussian_mixture.data: MixtureData
gaussian_mixture.metrics: MMD
gaussian_mixture.mixture: MEANS Mixture STDS WEIGHTS
gaussian_mixture.pipeline: GaussianMixtureDenoiser GaussianMixturePipeline ScheduleName
gaussian_mixture.render: Plane
gaussian_mixture.rewards: ComponentIndicator Coordinate Quadratic
image.data: ImageData
image.distances: frechet_distance kernel_distance neighbour_distances precision_recall
image.features: EMBEDDED FeatureArchitecture FeatureNetwork features_of load_features
image.folder: Cache Fit Reading Report Resample SUFFIXES
image.inception: InceptionV3 resize_like_tensorflow_1
image.metrics: Diversity SetDistances
image.pipeline: EMBEDDED ImagePipeline
image.rewards: Brightness ClassProbability
image.sources: Arrays DIGITS Digits Generated ImageFolder Images Source
image.train_features: accuracy loss_of main read shifted train
layout.classes: CLASS_LISTS class_list color_of
layout.critic: Critic
layout.data: LayoutData Task given
layout.encoder: EncoderArchitecture LayoutEncoder load_encoder load_published
layout.formats: read_arrays read_coco read_json read_rico
layout.grammar: CLASSES draw_page
layout.layouts: EMPTY Layouts check_layouts
layout.measures: alignment columns_below coverage gap_deviation inside_page intersections
    num_elements overlap share_of_size
layout.metrics: Diversity LayoutMeasures SetDistances box_wasserstein class_total_variation
    docsim frechet_distance max_iou source_layouts
layout.network: Architecture LayoutTransformer load_network
layout.pages: Element Packed Page elements_of pack reading_order
layout.pipeline: EMBEDDED LayoutPipeline
layout.render: draw save_layout to_image to_record to_svg
layout.rewards: Alignment ClassCounts Count Coverage GapRegularity GrammarRules InsidePage
    MinimumSize Overlap Relations
layout.sources: Grammar JSONLayouts PubLayNet RicoArrays RicoJSON Source
layout.streaming: JSONStream
layout.train_encoder: accuracy layouts_of losses main question train
molecule.batches: Batches FixedBatches SizeBatches training_batches
molecule.bonds: LENGTHS MARGINS atom_stability bond_limits bond_orders fitting_valences
    molecule_stability soft_bond_orders soft_links
molecule.chemistry: Chemistry INVALID chemistry_of keys
molecule.coupling: CoupledPointClouds coupled
molecule.data: AtomCounts MoleculeData QM9_COUNTS QM9_HEAVY_COUNTS histogram
molecule.descriptors: DESCRIPTORS synthetic_accessibility
molecule.edm: ARGS EDM load_edm
molecule.elements: ATOMIC_NUMBERS EXPLICIT HEAVY SYMBOLS VALENCES check_elements valences
molecule.enumeration: REJECTED enumerate_smiles grow
molecule.formats: read_arrays read_qm9 read_sdf read_smiles read_uncharacterized read_xyz
molecule.geometry: Embedded electronic_of embed strain_of with_hydrogens
molecule.graphs: BOND_TYPES Graphs graphs_of to_smiles
molecule.make_data: main
molecule.metrics: Drugs MoleculeMeasures Novelty SetDistances angles bond_lengths known_smiles
    mean_wasserstein size_total_variation type_total_variation
molecule.molecules: EMPTY Molecules check_molecules
molecule.network: Architecture Denoiser EGNN Transformer load_network
molecule.pipeline: EMBEDDED MoleculePipeline
molecule.preconditioning: Preconditioning
molecule.processes: in_processes
molecule.render: draw save_molecule to_image
molecule.rewards: AtomCount LogP Novelty QED RingCount SoftConnected SoftValence Stability
    Strain Substructures SyntheticAccessibility TPSA ValidConnected XTB
molecule.sources: Enumerated MoleculeFile QM9 SmilesFile Source Splits edm_split
molecule.structures: Packed Structure molecules_of pack
text_to_image.clip: CLIPEncoder Preprocessing
text_to_image.data: PromptData ShapesPictures ShapesPrompts read_prompts
text_to_image.jpeg: check_quality coded_bytes coefficients dc_differences dct_matrix
    quantisation_tables
text_to_image.metrics: Diversity
text_to_image.pipeline: EMBEDDED TextToImagePipeline
text_to_image.rewards: Brightness CLIPScore Colourfulness JPEGCompressibility
    JPEGIncompressibility ShapesEval SmoothJPEGCompressibility Symmetry check_pictures
    prompts_of
text_to_image.shapes.classifier: Architecture Classifier encode
text_to_image.shapes.detector: Array Detection Judgement Mask detect judge judge_detections
text_to_image.shapes.make_tokenizer: build_vocabulary learn_merges write_tokenizer
text_to_image.shapes.pictures: CLASSES labels_of paint scene
text_to_image.shapes.train_autoencoder: autoencoder_loss build_autoencoder finish reconstruct
    train
text_to_image.shapes.train_classifier: Batches Question accuracy ask between codes_of
    missing_scene near_miss pick question_loss recolored round_trip showing_scene shows soften
    train
text_to_image.shapes.train_clip: Batches Meaning build_clip contrastive_loss local_loss meanings
    optimise pixel_values ranking_accuracy relations save tokens train
text_to_image.shapes.training: arguments draw pixels_of save_half update_average warm_up_cosine
text_to_image.shapes.world: COLORS COUNTS Figure GROUNDS HALF_EXTENTS Picture Prompt RELATIONS
    Requirement SHAPES SIZE Scene Split TASKS all_prompts compose parse render sample
    signed_distance split_prompts
text_to_image.shapes_classifier: ShapesClassifier
"""
OLD = {
    f"domains.{module}": names.split()
    for module, names in re.findall(r"^(\S+): ([^:]+)$(?=\n\S|\n*\Z)", NAMES, re.MULTILINE)
}


def is_moved(module: str) -> bool:
    return type(importlib.util.find_spec(module).loader).__module__ == "lit_rlft.moved"


def test_the_table_is_read_whole() -> None:
    assert len(OLD) == NAMES.count(": ") and sum(map(len, OLD.values())) > 250


@pytest.mark.parametrize("module", OLD)
def test_old_modules_have_their_names(module: str) -> None:
    moved = is_moved(module)
    if moved:
        sys.modules.pop(module, None)  # others stay: a second copy would confuse other tests
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        loaded = importlib.import_module(module)
        missing = [name for name in OLD[module] if not hasattr(loaded, name)]
    assert not missing
    warned = [str(w.message) for w in said if issubclass(w.category, FutureWarning)]
    assert any(text.startswith(f"{module} has moved: write ") for text in warned) == moved


def test_names_of_a_module_that_is_a_package_now_warn() -> None:
    package = importlib.import_module("domains.molecule.chemistry")
    with pytest.warns(FutureWarning, match=r"chemistry\.keys has moved: write .*batch\.keys"):
        assert callable(package.keys)
    with pytest.raises(AttributeError, match="no attribute 'kees'"):
        package.kees  # noqa: B018


@pytest.mark.slow
def test_old_commands_run() -> None:
    command = [sys.executable, "-m", "domains.molecule.make_data", "--help"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0 and "--num-attempts" in result.stdout
    assert "write domains.molecule.train.make_data instead" in result.stderr
