"""Builds the native products of the CPU; all metadata is in setup.cfg.

They are optional: without a C++17 compiler, installation succeeds and products go through XLA.
"""

import concurrent.futures
import importlib.util
import os
import pathlib

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError

FOLDER = pathlib.Path('ops/kernels/cpu')
SOURCES = sorted(str(path) for path in FOLDER.glob('*.cc') if path.name != 'sanitize_main.cc')
HEADERS = sorted(str(path) for path in FOLDER.glob('*.h'))
FLAGS = ['-std=c++17', '-O3', '-g0', '-fvisibility=hidden', '-fno-math-errno', '-w']


class BuildNative(build_ext):
  """Finds the headers of XLA's FFI in jaxlib, and compiles the files side by side."""

  def build_extension(self, ext):
    spec = importlib.util.find_spec('jaxlib')
    if spec is None:
      raise CompileError('jaxlib, whose headers the native library needs, is not installed')
    include = pathlib.Path(spec.submodule_search_locations[0], 'include')

    def compile_one(source):
      return self.compiler.compile(
        [source],
        output_dir=self.build_temp,
        include_dirs=[str(include)],
        extra_postargs=FLAGS,
        depends=HEADERS,
      )

    with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
      objects = [name for names in pool.map(compile_one, ext.sources) for name in names]
    path = pathlib.Path(self.get_ext_fullpath(ext.name))
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renamed when it is whole: another process may be about to load it.
    partial = path.with_name(f'.{path.name}.partial')
    self.compiler.link_shared_object(objects, str(partial), target_lang='c++')
    os.replace(partial, path)


setup(
  ext_modules=[Extension('ops.kernels.cpu._native', SOURCES, optional=True)],
  cmdclass={'build_ext': BuildNative},
)
