"""The smooth JPEG size against PIL's files, whose tables and codes are read back from them."""

import io

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from PIL import Image
from scipy.fft import dctn
from scipy.stats import spearmanr
from torch import Tensor

from domains.text_to_image.pipeline import EMBEDDED
from domains.text_to_image.rewards.jpeg_size import (
    coded_bytes,
    coefficients,
    dc_differences,
    dct_matrix,
    quantisation_tables,
)
from domains.text_to_image.shapes import world
from lit_rlft.core.checks import UsageError
from lit_rlft.kit.images import to_image

QUALITIES = (1, 10, 25, 49, 50, 51, 75, 90, 95, 99, 100)
SIZES = [(16, 16), (32, 48), (24, 40), (19, 45), (17, 16), (8, 9), (1, 1)]
ZIGZAG = sorted(
    range(64), key=lambda k: (k // 8 + k % 8, k // 8 if (k // 8 + k % 8) % 2 else k % 8)
)


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def noise(num: int, height: int, width: int) -> Tensor:
    return torch.rand(num, 3, height, width, generator=generator())


def jpeg(picture: Tensor, quality: int) -> bytes:
    buffer = io.BytesIO()
    to_image(picture).save(buffer, "JPEG", quality=quality, subsampling="4:2:0")
    return buffer.getvalue()


def file_sizes(pictures: Tensor, quality: int) -> Tensor:
    return torch.tensor([float(len(jpeg(picture, quality))) for picture in pictures])


def segments(file: bytes) -> tuple[list[tuple[int, bytes]], bytes]:
    """Return marker segments before the picture data, and those data without byte stuffing."""
    start, found = 2, []
    while not found or found[-1][0] != 0xDA:
        length = int.from_bytes(file[start + 2 : start + 4], "big")
        found.append((file[start + 1], file[start + 4 : start + 2 + length]))
        start += 2 + length
    return found, file[start:-2].replace(b"\xff\x00", b"\xff")


def code_lengths() -> dict[int, dict[int, int]]:
    """Return the bits of each Huffman symbol: table 0 luma DC, 1 chroma DC, 16 and 17 AC."""
    tables = {}
    for marker, body in segments(jpeg(noise(1, 16, 16)[0], 95))[0]:
        if marker == 0xC4:
            lengths = [n for n, count in enumerate(body[1:17], 1) for _ in range(count)]
            tables[body[0]] = dict(zip(body[17:], lengths, strict=True))
    return tables


def coded(value: int, run: int, codes: dict[int, int]) -> int:
    bits = abs(value).bit_length()
    return run // 16 * codes.get(0xF0, 0) + codes[run % 16 * 16 + bits] + bits


def block_bits(block: list[int], codes: dict[int, int]) -> int:
    total = run = 0
    for value in (block[k] for k in ZIGZAG[1:]):
        total, run = (total, run + 1) if value == 0 else (total + coded(value, run, codes), 0)
    return total + (codes[0] if run else 0)


def exact_bytes(picture: Tensor, quality: int) -> int:
    """Huffman-code rounded coefficients as T.81 F.1.2 says; the picture data's bytes."""
    codes = code_lengths()
    luma, chroma = (part.round() for part in coefficients(picture, quantisation_tables(quality)))
    luma_dc, chroma_dc = (part.flatten().int().tolist() for part in dc_differences(luma, chroma))
    bits = sum(coded(v, 0, codes[0]) for v in luma_dc) + sum(
        coded(v, 0, codes[1]) for v in chroma_dc
    )
    for part, table in ((luma, codes[16]), (chroma, codes[17])):
        bits += sum(block_bits(block, table) for block in part.int().reshape(-1, 64).tolist())
    fill = len(luma_dc) - luma[0, ..., 0, 0].numel()
    return -(-(bits + fill * codes[16][0]) // 8)


@pytest.fixture(scope="module")
def autoencoder() -> AutoencoderKL:
    vae = AutoencoderKL.from_pretrained(EMBEDDED / "shapes" / "vae", torch_dtype=torch.float32)
    return vae.requires_grad_(False).eval()


@pytest.fixture(scope="module")
def drawn() -> Tensor:
    rng = np.random.default_rng(1)  # not the pictures the constants were fitted to
    prompts = [prompt for task in world.TASKS for prompt in world.all_prompts(task)]
    arrays = np.stack([world.sample(rng, prompts)[1] for _ in range(96)])
    return torch.from_numpy(arrays).permute(0, 3, 1, 2).float() / 255


def decoded(autoencoder: AutoencoderKL, latents: Tensor) -> Tensor:
    return (autoencoder.decode(latents).sample / 2 + 0.5).clamp(0, 1)


@pytest.fixture(scope="module")
def latents(autoencoder: AutoencoderKL, drawn: Tensor) -> Tensor:
    with torch.no_grad():
        return autoencoder.encode(2 * drawn - 1).latent_dist.mode()


@pytest.fixture(scope="module")
def pictures(autoencoder: AutoencoderKL, drawn: Tensor, latents: Tensor) -> dict[str, Tensor]:
    """Pictures as they are drawn, as the embedded model makes them, and noisy."""
    with torch.no_grad():
        made = decoded(autoencoder, latents)
    noisy = made + torch.randn(made.shape, generator=generator()) * 3 / 255
    return {"drawn": drawn, "made": made, "noisy": noisy.clamp(0, 1), "cut": made[..., :43, :57]}


class TestQuantisationTables:
    @pytest.mark.parametrize("quality", QUALITIES)
    def test_are_those_of_the_file(self, quality: int):
        with Image.open(io.BytesIO(jpeg(noise(1, 16, 16)[0], quality))) as image:
            expected = torch.tensor([image.quantization[0], image.quantization[1]])
        assert quantisation_tables(quality).flatten(1).equal(expected)

    @pytest.mark.parametrize("quality", [0, 101])
    def test_quality_out_of_range_is_refused(self, quality: int):
        with pytest.raises(UsageError, match=f"quality is {quality}; give 1 to 100"):
            quantisation_tables(quality)


class TestCoefficients:
    def test_dct_matrix_is_orthonormal(self):
        assert (dct_matrix() @ dct_matrix().mT).allclose(torch.eye(8, dtype=torch.float64))
        assert dct_matrix(torch.float32).dtype == torch.float32

    def test_luma_is_the_dct_of_scipy(self):
        pictures = noise(2, 24, 40).double()
        r, g, b = 255 * pictures.numpy().swapaxes(0, 1)
        blocks = (0.299 * r + 0.587 * g + 0.114 * b - 128).reshape(2, 3, 8, 5, 8)
        expected = dctn(blocks.swapaxes(2, 3), axes=(3, 4), norm="ortho")
        tables = quantisation_tables(75)
        actual, _ = coefficients(pictures, tables)
        assert actual.allclose(torch.from_numpy(expected) / tables[0])

    def test_chroma_is_the_dct_of_scipy(self):
        pictures = noise(2, 32, 48).double()
        r, g, b = 255 * pictures.numpy().swapaxes(0, 1)
        # The coefficients as T.871 prints them.
        cb = -0.168736 * r - 0.331264 * g + 0.5 * b
        cr = 0.5 * r - 0.418688 * g - 0.081312 * b
        small = np.stack([cb, cr], axis=1).reshape(2, 2, 16, 2, 24, 2).mean(axis=(3, 5))
        blocks = small.reshape(2, 2, 2, 8, 3, 8).swapaxes(3, 4)
        tables = quantisation_tables(75)
        _, actual = coefficients(pictures, tables)
        expected = torch.from_numpy(dctn(blocks, axes=(4, 5), norm="ortho")) / tables[1]
        assert actual.allclose(expected, atol=1e-4)

    @pytest.mark.parametrize("size", SIZES)
    def test_code_flat_grey_blocks_to_the_byte(self, size: tuple[int, int]):
        # Nothing libjpeg would round differently, so this is about the order of blocks and edges.
        levels = torch.randint(256, (1, 1, *size), generator=generator())
        grey = levels[..., ::8, ::8].repeat_interleave(8, 2).repeat_interleave(8, 3)
        grey = grey[..., : size[0], : size[1]]
        picture = grey.expand(-1, 3, -1, -1).double() / 255
        for quality in (20, 95):
            data = segments(jpeg(picture[0], quality))[1]
            assert exact_bytes(picture, quality) == len(data)

    @pytest.mark.parametrize("size", SIZES)
    def test_code_any_picture_to_a_few_bytes(self, size: tuple[int, int]):
        # Of one colour in each 4 x 4 pixels, so that the files hold few rounding errors.
        colours = noise(1, -(-size[0] // 4), -(-size[1] // 4))
        picture = colours.repeat_interleave(4, 2).repeat_interleave(4, 3)
        picture = (255 * picture[..., : size[0], : size[1]]).round().double() / 255
        data = segments(jpeg(picture[0], 75))[1]
        assert exact_bytes(picture, 75) == pytest.approx(len(data), rel=0.03, abs=2)


class TestCodedBytes:
    @pytest.mark.parametrize("size", SIZES)
    def test_grey_picture_is_exact(self, size: tuple[int, int]):
        grey = torch.full((1, 3, *size), 128 / 255, dtype=torch.float64)
        actual = coded_bytes(grey, quantisation_tables(95)).ceil()
        assert actual.item() == len(jpeg(grey[0], 95))

    def test_dc_costs_what_the_codes_take(self):
        codes = code_lengths()
        # At quality 100 a block of level 128 + d has the DC coefficient 8 d.
        for d in range(1, 32):
            grey = torch.full((1, 3, 8, 8), (128 + d) / 255, dtype=torch.float64)
            tables = quantisation_tables(100)
            bits = 8 * (coded_bytes(grey, tables) - coded_bytes(grey * 128 / (128 + d), tables))
            expected = coded(8 * d, 0, codes[0]) - codes[0][0]
            assert bits.item() == pytest.approx(expected, abs=2.5)

    @pytest.mark.parametrize("quality", [50, 75, 95])
    @pytest.mark.parametrize("kind", ["drawn", "made", "noisy", "cut"])
    def test_orders_pictures_as_their_files(
        self, pictures: dict[str, Tensor], kind: str, quality: int
    ):
        sizes = file_sizes(pictures[kind], quality)
        estimates = coded_bytes(pictures[kind], quantisation_tables(quality))
        assert spearmanr(estimates, sizes).statistic > 0.98
        assert (estimates / sizes).mean().item() == pytest.approx(1, abs=0.04)
        assert (estimates / sizes - 1).abs().max() < 0.12

    def test_orders_qualities_as_files(self, pictures: dict[str, Tensor]):
        few = pictures["made"][:8]
        sizes = torch.stack([file_sizes(few, quality) for quality in QUALITIES])
        estimates = torch.stack([coded_bytes(few, quantisation_tables(q)) for q in QUALITIES])
        assert spearmanr(estimates.flatten(), sizes.flatten()).statistic > 0.98

    def test_ascent_on_pixels_makes_files_smaller(self, pictures: dict[str, Tensor]):
        tables, x = quantisation_tables(75), pictures["made"][:24]
        start = file_sizes(x, 75)
        for _ in range(40):
            x.requires_grad_()
            (slope,) = torch.autograd.grad(coded_bytes(x, tables).sum(), x)
            x = (x.detach() - 3e-4 * slope).clamp(0, 1)
        assert (file_sizes(x, 75) < start).all()

    @pytest.mark.parametrize("quality", [75, 95])
    def test_ascent_on_latents_makes_files_smaller(
        self, autoencoder: AutoencoderKL, latents: Tensor, quality: int
    ):
        tables, x_0 = quantisation_tables(quality), latents[:8].clone().requires_grad_()
        optimiser = torch.optim.Adam([x_0], lr=0.2)
        start = file_sizes(decoded(autoencoder, x_0.detach()), quality)
        for _ in range(15):
            optimiser.zero_grad()
            coded_bytes(decoded(autoencoder, x_0), tables).sum().backward()
            optimiser.step()
        sizes = file_sizes(decoded(autoencoder, x_0.detach()), quality)
        assert (sizes < start).all()
        assert (sizes - 625).mean() < 0.9 * (start - 625).mean()

    @pytest.mark.parametrize("size", [(9, 18), (3, 2)])
    @pytest.mark.parametrize("quality", [50, 95])
    def test_gradient_is_that_of_finite_differences(self, size: tuple[int, int], quality: int):
        tables = quantisation_tables(quality)
        x = noise(1, *size).double().requires_grad_()
        torch.autograd.gradcheck(lambda x: coded_bytes(x, tables), x, fast_mode=True)

    @pytest.mark.parametrize("value", [0.0, 0.3, 128 / 255, 1.0])
    def test_gradient_is_finite_in_flat_pictures(self, value: float):
        x = torch.full((1, 3, 20, 20), value, requires_grad=True)
        coded_bytes(x, quantisation_tables(100)).sum().backward()
        assert x.grad is not None and x.grad.isfinite().all()

    def test_gradient_is_finite_at_the_largest_coefficients(self):
        x = torch.zeros(1, 3, 32, 32)
        x[..., 16:] = 1
        x.requires_grad_()
        coded_bytes(x, quantisation_tables(100)).sum().backward()
        assert x.grad is not None and x.grad.isfinite().all() and x.grad.abs().sum() > 0

    def test_pictures_do_not_affect_each_other(self):
        x, tables = noise(3, 20, 28), quantisation_tables(75)
        alone = torch.cat([coded_bytes(picture[None], tables) for picture in x])
        assert coded_bytes(x, tables).allclose(alone)
        assert coded_bytes(x[:0], tables).shape == (0,)
