// What the algorithms of a convolution have in common: how XLA calls them.

#ifndef RESFLAX_OPS_KERNELS_CONVOLUTION_H_
#define RESFLAX_OPS_KERNELS_CONVOLUTION_H_

#include "kernels.h"

namespace {

inline ffi::Error Unsupported() {
  return ffi::Error(ffi::ErrorCode::kInvalidArgument,
                    "a convolution that the native lowering does not know");
}

}  // namespace

#define RESFLAX_HANDLER(name)                                          \
  XLA_FFI_DEFINE_HANDLER_SYMBOL(Resflax##name, name,                   \
                                ffi::Ffi::Bind()                       \
                                    .Ctx<ffi::ThreadPool>()            \
                                    .Arg<ffi::Buffer<ffi::F32>>()      \
                                    .Arg<ffi::Buffer<ffi::F32>>()      \
                                    .Ret<ffi::Buffer<ffi::F32>>()      \
                                    .Attr<int64_t>("groups")           \
                                    .Attr<int64_t>("stride")           \
                                    .Attr<int64_t>("top")              \
                                    .Attr<int64_t>("left"))

#endif  // RESFLAX_OPS_KERNELS_CONVOLUTION_H_
