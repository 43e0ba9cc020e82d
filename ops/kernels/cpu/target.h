// Compiles what lies between LISSOM_TARGET_BEGIN(...) and LISSOM_TARGET_END for more than the
// baseline instruction set. Clang spells it with the attribute, GCC with its own pragma.

#ifndef LISSOM_TARGET_H_
#define LISSOM_TARGET_H_

#define LISSOM_PRAGMA(text) _Pragma(#text)

#if defined(__clang__)
#define LISSOM_TARGET_BEGIN(list) \
  LISSOM_PRAGMA(clang attribute push(__attribute__((target(list))), apply_to = function))
#define LISSOM_TARGET_END LISSOM_PRAGMA(clang attribute pop)
#else
#define LISSOM_TARGET_BEGIN(list) \
  LISSOM_PRAGMA(GCC push_options) LISSOM_PRAGMA(GCC target(list))
#define LISSOM_TARGET_END LISSOM_PRAGMA(GCC pop_options)
#endif

#endif  // LISSOM_TARGET_H_
