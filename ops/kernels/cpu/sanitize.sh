#!/bin/sh
# Runs the native products and attention on odd shapes, and the sharing of work among threads, under
# AddressSanitizer and UndefinedBehaviorSanitizer. Needs a C++17 compiler (CXX, else c++), not JAX.
# Prints each instruction set that the machine has; exits with 1 if a result is wrong, and with the
# sanitizer's own message and status if it finds something. Minutes: a few, nearly all compiling.
#
#   ops/kernels/cpu/sanitize.sh
set -eu
cd "$(dirname "$0")"
build=$(mktemp -d)
trap 'rm -rf "$build"' EXIT

flags='-fsanitize=address,undefined -fno-sanitize-recover=all'
for source in sanitize_main self_test product attention prefill workers portable avx2 avxvnni avx512 avx512_bf16; do
  "${CXX:-c++}" -std=c++17 -O1 -w $flags -c "$source.cc" -o "$build/$source.o" &
  jobs="${jobs-} $!"
done
for job in $jobs; do wait "$job"; done
"${CXX:-c++}" $flags "$build"/*.o -o "$build/main" -lpthread
"$build/main"
