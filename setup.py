"""Installs `nnunet_csm`; `plans/` becomes `nnunet_csm.presets`, `dataset_conversion/` `nnunet_csm.dataset_conversion`."""

import re
from pathlib import Path

from setuptools import find_namespace_packages, setup

ROOT = Path(__file__).parent

INSTALL_REQUIRES = [
    "nnunetv2>=2.8,<2.9",  # the host: we subclass its trainer, whose methods change between minor versions
    "torch>=2.6,<3,!=2.9.*",  # torch.compiler.set_stance, get_total_norm, fused AdamW; nnunetv2 excludes 2.9
    "dynamic-network-architectures>=0.4.4,<0.5",  # blocks of the UNETR decoder; the range nnunetv2 asks for
    "timm>=1.0.20,<1.0.23",  # ViT blocks and learning-rate schedules; dynamic-network-architectures caps it below 1.0.23
    "einops>=0.8,<0.9",  # every change of token order is written as an einops pattern
    "jaxtyping>=0.2.36,<0.4",  # shapes in signatures; checked only in tests
    "numpy>=1.26,<3",  # arrays between nnU-Net's files and torch
    "SimpleITK>=2.3,<3",  # reads, resamples, registers and writes raw images, decodes compressed DICOM; nnU-Net's own reader
    "nibabel>=5.2,<6",  # NIfTI headers as they are: SimpleITK refuses some and repairs others in silence
    "pydicom>=3,<4",  # DICOM attributes of every slice and of every frame of an enhanced file, of which GDCM shows the first
    "blosc2>=3.3.2,<5",  # nnU-Net's preprocessed volumes are .b2nd files
    "batchgenerators>=0.25.1,<0.26",  # file helpers that nnU-Net's trainer is written with
    "batchgeneratorsv2>=0.3.2,<0.4",  # augmentation of the fine-tuning
    "acvl-utils>=0.2.6,<0.3",  # cropping and padding in nnU-Net's loaders, which fine-tuning runs step by step
    "pandas>=2.2,<4",  # tables of results
    "tabulate>=0.9,<1",  # pandas writes Markdown tables with it
    "matplotlib>=3.8,<4",  # pictures
    "packaging>=23,<27",  # which requirements of packages hold here, for a container; matplotlib brings it along
    "pillow>=10,<14",  # PNG with a small palette
    "jinja2>=3.1,<4",  # the self-contained HTML page; the files that a container is built from
    "scipy>=1.11,<2",  # tests of paired differences
    "joblib>=1.3,<2",  # cores that a container or a cluster gives
    "scikit-image>=0.22,<0.27",  # PSNR and SSIM of what pretrainings rebuild; nnunetv2 brings it along
    "scikit-learn>=1.4,<2",  # folds by patient; which of two equal series is the original
    "tqdm>=4.66,<5",  # progress of the longer steps
    "safetensors>=0.4.3,<1",  # weights from and for others, which execute nothing; timm brings it along
]

TEST_REQUIRES = [
    "pytest>=8,<10",  # runs the tests
    "pytest-xdist>=3.6,<4",  # `-n 2` on more than one core
    "hypothesis>=6.100,<7",  # properties of names, masks, tokens
    "beartype>=0.20,<0.24",  # checks jaxtyping's shapes while tests run
    "ruff>=0.17,<0.18",  # lint and format; another minor version formats differently
    "mypy>=2.4,<3",  # types
    "import-linter>=2.3,<3",  # the order of the house, see pyproject.toml
    "pre-commit>=4,<5",  # the same checks before each commit
]


DOCS_REQUIRES = [
    "mkdocs>=1.6,<2",  # the pages as a site, see mkdocs.yml
    "mkdocs-material>=9.6,<10",  # its looks, its search
]

SLURM = "submitit>=1.5,<2"  # runs of a study as jobs of a cluster
HUB = "huggingface_hub>=0.30,<3"  # the local cache of Hugging Face's hub; timm brings it along
ONNX = [
    "onnx>=1.17,<2",  # the format, for torch's exporter
    "onnxscript>=0.2,<1",  # torch's exporter is written with it
    "onnxruntime>=1.20,<2",  # every exported model is run and compared
]
DICOM = "highdicom>=0.28,<0.29"  # DICOM segmentations and reports, with all that the standard wants in them
PARQUET = "pyarrow>=15,<27"  # embeddings as .parquet
UMAP = "umap-learn>=0.5.6,<0.6"  # a second picture of embeddings


def version() -> str:
    """The version written in the package, read without importing it (its requirements are not installed yet)."""
    text = (ROOT / "nnunet_csm" / "__init__.py").read_text(encoding="utf-8")
    match = re.search(r'^__version__ = "([^"]+)"$', text, flags=re.MULTILINE)
    if match is None:
        msg = 'nnunet_csm/__init__.py holds no line of the form __version__ = "1.2.3"'
        raise ValueError(msg)
    return match.group(1)


if __name__ == "__main__":
    # nnunet_ext is found whether or not it has an __init__.py: nnU-Net needs the folder, not the package
    packages = find_namespace_packages(str(ROOT), include=["nnunet_csm", "nnunet_csm.*"], exclude=["*.__pycache__"])
    setup(
        name="nnunet_csm",
        version=version(),
        description="Cross-series masking for nnU-Net v2: pretrain on unlabelled multi-series MRI, fine-tune on few labels",
        long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
        long_description_content_type="text/markdown",
        license="Apache-2.0",
        license_files=["LICENSE"],
        python_requires=">=3.11,<3.14",
        packages=[*packages, "nnunet_csm.presets", "nnunet_csm.dataset_conversion"],
        package_dir={"nnunet_csm.presets": "plans", "nnunet_csm.dataset_conversion": "dataset_conversion"},
        package_data={
            "": ["*.json", "**/*.json", "*.html", "**/*.html", "**/*.bib"],
            "nnunet_csm.sharing.container_files": ["*"],
        },
        include_package_data=False,
        install_requires=INSTALL_REQUIRES,
        extras_require={
            "test": [*TEST_REQUIRES, SLURM, HUB, PARQUET, DICOM, *ONNX],
            "slurm": [SLURM],
            "hub": [HUB],
            "dicom": [DICOM],
            "onnx": ONNX,
            "parquet": [PARQUET],
            "umap": [UMAP],
            "docs": DOCS_REQUIRES,
        },
        entry_points={"console_scripts": ["nnunet_csm = nnunet_csm.cli:main"]},
    )
