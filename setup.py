"""Runs CMake and ninja, and puts the module into smpq_ext/. What is built, and how, is in CMakeLists.txt."""

import os
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext


class CMakeBuild(build_ext):
    def build_extension(self, ext: Extension) -> None:
        source = Path(__file__).parent.resolve()
        target = Path(self.get_ext_fullpath(ext.name)).parent.resolve()
        build = source / "build" / f"cmake-{sys.implementation.cache_tag}"
        cmake = ["cmake", "-S", source, "-B", build, "-G", "Ninja", f"-DPython_EXECUTABLE={sys.executable}"]
        cmake += [
            f"-DCMAKE_LIBRARY_OUTPUT_DIRECTORY={target}",
            f"-DSMPQ_CUDA={os.environ.get('SMPQ_CUDA', 'auto').lower()}",
        ]
        subprocess.run(cmake, check=True)
        subprocess.run(["cmake", "--build", build], check=True)


setup(ext_modules=[Extension("smpq_ext._C", [])], cmdclass={"build_ext": CMakeBuild})
