// The one file that sees Python. Addresses, sizes and strides come in; flashx/problem.py has checked them.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <array>
#include <iterator>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <utility>
#include <vector>

#include "core/philox.h"
#include "core/schedule.h"
#include "cpu/cpu.h"
#include "cuda/cuda.h"
#if FLASHX_HAS_EMULATOR
#include "emulator/bind.h"
#endif

namespace py = pybind11;
using namespace flashx;

namespace {

void* pointer(uintptr_t address) { return reinterpret_cast<void*>(address); }

// (address, batch stride, head stride, row stride)
using PyView = std::tuple<uintptr_t, int64_t, int64_t, int64_t>;

View view(const PyView& v) {
  return {reinterpret_cast<void*>(std::get<0>(v)), std::get<1>(v), std::get<2>(v), std::get<3>(v)};
}

IntervalMask mask(int64_t left, int64_t right, int64_t shift, int64_t first) {
  constexpr int64_t limit = IntervalMask::kUnbounded;
  return {clamp<int64_t>(left, -limit, limit), clamp<int64_t>(right, -limit, limit),
          clamp<int64_t>(shift, -limit, limit), clamp<int64_t>(first, 0, limit)};
}

// (max, sum, accumulator, suspend); empty where a call starts and ends by itself.
using PyCarry = std::optional<std::tuple<uintptr_t, uintptr_t, uintptr_t, bool>>;

Carry carry(const PyCarry& c) {
  if (!c) return {};
  return {pointer(std::get<0>(*c)), pointer(std::get<1>(*c)), pointer(std::get<2>(*c)), std::get<3>(*c)};
}

template <typename T>
const T* table(uintptr_t address) {
  return static_cast<const T*>(pointer(address));
}

const char* kind_name(TileKind kind) {
  return kind == TileKind::Skip ? "skip" : kind == TileKind::Full ? "full" : "partial";
}

void bind_problem(py::module_& m) {
  py::class_<Problem>(m, "Problem")
      .def(py::init<>())
      .def_property(
          "dtype", [](const Problem& p) { return static_cast<int>(p.dtype); },
          [](Problem& p, int dtype) { p.dtype = static_cast<DType>(dtype); })
      .def_readwrite("batch", &Problem::batch)
      .def_readwrite("q_heads", &Problem::q_heads)
      .def_readwrite("kv_heads", &Problem::kv_heads)
      .def_readwrite("q_len", &Problem::q_len)
      .def_readwrite("k_len", &Problem::k_len)
      .def_readwrite("head_dim", &Problem::head_dim)
      .def_readwrite("value_dim", &Problem::value_dim)
      .def_readwrite("scale", &Problem::scale)
      .def_readwrite("softcap", &Problem::softcap)
      .def_readwrite("q_rows", &Problem::q_rows)
      .def_readwrite("k_rows", &Problem::k_rows)
      .def_readwrite("packed", &Problem::packed)
      .def_readwrite("unified_max", &Problem::unified_max)
      .def("set_mask", [](Problem& p, int64_t left, int64_t right, int64_t shift,
                          int64_t first) { p.mask = mask(left, right, shift, first); })
      .def(
          "set_blocks",
          [](Problem& p, uintptr_t map, int64_t batch, int64_t head, int64_t q_blocks, int64_t k_blocks, uintptr_t bits,
             int64_t bitmaps, int32_t q_block, int32_t k_block) {
            if (q_block < 1 || k_block < BlockMap::kPiece || k_block % BlockMap::kPiece != 0) {
              throw std::invalid_argument("blocks: sizes must be multiples of 16");
            }
            p.blocks = {
                table<int32_t>(map), table<uint32_t>(bits), batch, head, q_blocks, k_blocks, bitmaps, q_block, k_block};
          })
      .def("set_sequences", [](Problem& p, uintptr_t sequences) { p.sequences = table<int32_t>(sequences); })
      .def("set_members",
           [](Problem& p, uintptr_t members, uintptr_t member_begin, int64_t groups) {
             p.members = table<int32_t>(members), p.member_begin = table<int32_t>(member_begin), p.groups = groups;
           })
      .def("set_pages",
           [](Problem& p, uintptr_t pages, int64_t width, int64_t size, int64_t count) {
             if (width < 1 || size < 1 || count < 1) throw std::invalid_argument("pages: sizes must be at least 1");
             p.pages = {table<int32_t>(pages), width, size, count};
           })
      .def("set_bias",
           [](Problem& p, uintptr_t data, int dtype, const std::vector<int64_t>& stride,
              const std::vector<int64_t>& size) {
             if (stride.size() != 4 || size.size() > 4) throw std::invalid_argument("bias: 4 strides, at most 4 sizes");
             p.bias = {pointer(data), static_cast<DType>(dtype)};
             std::copy(stride.begin(), stride.end(), p.bias.stride);
             std::copy(size.begin(), size.end(), p.bias.size + 4 - size.size());
           })
      .def("set_alibi",
           [](Problem& p, uintptr_t data, int64_t batch_stride) {
             p.alibi_slopes = pointer(data);
             p.alibi_batch_stride = batch_stride;
           })
      .def("set_sinks", [](Problem& p, uintptr_t data) { p.sinks = pointer(data); })
      .def("set_dropout", [](Problem& p, double dropout_p, uint64_t seed) {
        p.dropout_p = dropout_p;
        p.seed = seed;
      });
}

// A forward on the CPU, bound to everything but addresses: one call, or the levels of one that have no members. A batch
// entry's, a head's and a row's strides make a PyView's.
class CpuCall {
 public:
  using Strides = std::tuple<int64_t, int64_t, int64_t>;
  // A level's problem, and its key and value.
  using Level = std::tuple<Problem, Strides, Strides>;

  CpuCall(const std::string& isa, const Strides& query, const Strides& out, const std::vector<Level>& levels)
      : forward_(cpu_kernels(isa).forward) {
    if (levels.empty()) throw std::invalid_argument("levels must not be empty");
    for (const auto& [problem, key, value] : levels) {
      levels_.push_back({problem, {strided(query), strided(key), strided(value), strided(out), nullptr, {}}});
    }
  }

  // keys_and_values: each level's two addresses.
  void operator()(uintptr_t query, const std::vector<uintptr_t>& keys_and_values, uintptr_t out, int threads,
                  const PyCarry& state) const {
    if (keys_and_values.size() != 2 * levels_.size()) {
      throw std::invalid_argument("keys_and_values must have 2 addresses for each level, got " +
                                  std::to_string(keys_and_values.size()));
    }
    std::vector<ForwardCall> levels = levels_;
    for (size_t i = 0; i < levels.size(); ++i) {
      ForwardTensors& tensors = levels[i].tensors;
      tensors.carry = carry(state);
      tensors.query.data = pointer(query), tensors.out.data = pointer(out);
      tensors.key.data = pointer(keys_and_values[2 * i]), tensors.value.data = pointer(keys_and_values[2 * i + 1]);
    }
    py::gil_scoped_release release;
    forward_(levels.data(), static_cast<int>(levels.size()), threads);
  }

 private:
  static View strided(const Strides& s) { return {nullptr, std::get<0>(s), std::get<1>(s), std::get<2>(s)}; }

  void (*forward_)(const ForwardCall*, int, int);
  std::vector<ForwardCall> levels_;
};

void bind_cpu(py::module_& m) {
  py::class_<CpuCall>(m, "CpuCall")
      .def(py::init<const std::string&, const CpuCall::Strides&, const CpuCall::Strides&,
                    const std::vector<CpuCall::Level>&>())
      .def("__call__", &CpuCall::operator(), py::arg("query"), py::arg("keys_and_values"), py::arg("out"),
           py::arg("threads"), py::arg("carry") = std::nullopt);
  m.def("cpu_isas", &cpu_isas);
  // (problem, query, key, value, out, lse) of each level.
  using PyLevel = std::tuple<Problem, PyView, PyView, PyView, PyView, uintptr_t>;
  m.def("cpu_forward",
        [](const std::string& isa, int threads, const std::vector<PyLevel>& given, const PyCarry& state) {
          if (given.empty()) throw std::invalid_argument("levels must not be empty");
          std::vector<ForwardCall> levels;
          for (const auto& [problem, query, key, value, out, lse] : given) {
            levels.push_back({problem, {view(query), view(key), view(value), view(out), pointer(lse), carry(state)}});
          }
          const Kernels kernels = cpu_kernels(isa);
          py::gil_scoped_release release;
          kernels.forward(levels.data(), static_cast<int>(levels.size()), threads);
        });
  m.def("cpu_backward",
        [](const Problem& problem, const std::string& isa, int threads, const PyView& query, const PyView& key,
           const PyView& value, const PyView& out, uintptr_t lse, const PyView& grad_out, uintptr_t grad_lse,
           uintptr_t delta, const PyView& grad_query, const PyView& grad_key, const PyView& grad_value,
           uintptr_t grad_bias, bool adds_grad_query) {
          const BackwardTensors tensors{view(query),      view(key),      view(value),       view(out),
                                        view(grad_out),   pointer(lse),   pointer(grad_lse), pointer(delta),
                                        view(grad_query), view(grad_key), view(grad_value),  pointer(grad_bias),
                                        adds_grad_query};
          const Kernels kernels = cpu_kernels(isa);
          py::gil_scoped_release release;
          kernels.backward(problem, tensors, threads);
        });
  const auto at_least = [](const char* name, int64_t value, int64_t least) {
    if (value < least) {
      throw std::invalid_argument(std::string(name) + " must be >= " + std::to_string(least) + ", got " +
                                  std::to_string(value));
    }
  };
  m.def("cpu_multiply_adds", [at_least](const std::string& isa, const std::string& unit, int64_t rounds, int threads) {
    at_least("rounds", rounds, 0);
    at_least("threads", threads, 1);
    constexpr std::pair<const char*, Unit> units[] = {
        {"fp32", Unit::Float32}, {"bf16_pairs", Unit::BFloat16Pairs}, {"bf16_tiles", Unit::BFloat16Tiles}};
    const auto* found = std::find_if(std::begin(units), std::end(units), [&](auto& u) { return unit == u.first; });
    if (found == std::end(units)) {
      throw std::invalid_argument("unit must be fp32, bf16_pairs or bf16_tiles, got '" + unit + "'");
    }
    const Kernels kernels = cpu_kernels(isa);
    py::gil_scoped_release release;
    return kernels.multiply_adds(found->second, rounds, threads);
  });
  m.def("cpu_read", [at_least](const std::string& isa, uintptr_t words, int64_t count, int threads) {
    at_least("count", count, 0);
    at_least("threads", threads, 1);
    const Kernels kernels = cpu_kernels(isa);
    py::gil_scoped_release release;
    return kernels.read(table<uint32_t>(words), count, threads);
  });
}

// One machine that runs csrc/cuda: _C.cuda or _C.cuda_emulated.
[[maybe_unused]] void bind_machine(py::module_& m, const Machine& machine) {
  m.def("forward_workspace", machine.forward_workspace);
  m.def("forward_kernel", machine.forward_kernel);
  m.def("forward", [machine](const Problem& problem, const PyView& query, const PyView& key, const PyView& value,
                             const PyView& out, uintptr_t lse, const PyCarry& state, int device, uintptr_t stream,
                             uintptr_t workspace, bool tf32) {
    const ForwardTensors tensors{view(query), view(key), view(value), view(out), pointer(lse), carry(state)};
    py::gil_scoped_release release;
    machine.forward(problem, tensors, CudaCall{device, pointer(stream), pointer(workspace), tf32});
  });
  m.def("backward",
        [machine](const Problem& problem, const PyView& query, const PyView& key, const PyView& value,
                  const PyView& out, uintptr_t lse, const PyView& grad_out, uintptr_t grad_lse, uintptr_t delta,
                  const PyView& grad_query, const PyView& grad_key, const PyView& grad_value, uintptr_t grad_bias,
                  bool adds_grad_query, int device, uintptr_t stream, bool tf32) {
          const BackwardTensors tensors{view(query),      view(key),      view(value),       view(out),
                                        view(grad_out),   pointer(lse),   pointer(grad_lse), pointer(delta),
                                        view(grad_query), view(grad_key), view(grad_value),  pointer(grad_bias),
                                        adds_grad_query};
          py::gil_scoped_release release;
          machine.backward(problem, tensors, CudaCall{device, pointer(stream), nullptr, tf32});
        });
}

// csrc/core as it is, for the tests: the kernels' own masks, schedules and random bits.
void bind_core(py::module_& m) {
  py::module_ core = m.def_submodule("core", "csrc/core, for tests");
  py::class_<IntervalMask>(core, "IntervalMask")
      .def(py::init([](std::optional<int64_t> left, std::optional<int64_t> right, int64_t shift, int64_t first) {
             return mask(left.value_or(IntervalMask::kUnbounded), right.value_or(IntervalMask::kUnbounded), shift,
                         first);
           }),
           py::arg("left"), py::arg("right"), py::arg("shift"), py::arg("first") = 0)
      .def("lo", [](const IntervalMask& m, int64_t q, int64_t k_len) { return m.lo(q, k_len); })
      .def("hi", [](const IntervalMask& m, int64_t q, int64_t k_len) { return m.hi(q, k_len); })
      .def("kind", [](const IntervalMask& m, int64_t q_first, int64_t q_last, int64_t k_begin, int64_t k_end,
                      int64_t k_len) { return kind_name(m.kind(q_first, q_last, k_begin, k_end, k_len)); });
  core.def("row_schedule",
           [](const IntervalMask& mask, int64_t k_len, int64_t q_first, int64_t q_last, int64_t tile_len) {
             if (tile_len < 1) throw std::invalid_argument("tile_len must be >= 1, got " + std::to_string(tile_len));
             std::vector<std::tuple<int64_t, int64_t, std::string>> tiles;
             for (const KeyTile tile : RowSchedule(mask, k_len, q_first, q_last, tile_len)) {
               tiles.emplace_back(tile.begin, tile.end, kind_name(tile.kind));
             }
             return tiles;
           });
  core.def("column_schedule", [](const IntervalMask& mask, int64_t q_len, int64_t k_begin, int64_t k_end) {
    const ColumnSchedule schedule(mask, q_len, k_begin, k_end);
    return std::make_pair(schedule.begin, schedule.end);
  });
  core.def("philox", [](uint64_t seed, uint32_t c0, uint32_t c1, uint32_t c2) {
    uint32_t words[4];
    Philox{seed}(c0, c1, c2, words);
    return std::array<uint32_t, 4>{words[0], words[1], words[2], words[3]};
  });
}

py::dict build_info() {
  py::dict info;
  info["version"] = FLASHX_VERSION;
  std::vector<std::string> backends{"cpu"}, archs;
#if FLASHX_HAS_CUDA
  backends.emplace_back("cuda");
  std::istringstream list(FLASHX_CUDA_ARCHS);  // "80 90+PTX"
  archs.assign(std::istream_iterator<std::string>(list), {});
#endif
#if FLASHX_HAS_EMULATOR
  backends.emplace_back("cuda_emulated");
#endif
  info["backends"] = backends;
  info["cuda_archs"] = archs;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "g++ " __VERSION__;
#endif
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "flashx's compiled kernels";
  bind_problem(m);
  bind_cpu(m);
  bind_core(m);
#if FLASHX_HAS_CUDA
  py::module_ cuda_part = m.def_submodule("cuda", "csrc/cuda on GPUs");
  bind_machine(cuda_part, cuda::machine());
  cuda_part.def("conformance_names", &cuda::conformance_names);
  cuda_part.def("conformance", [](const std::string& name, uintptr_t input, int64_t input_bytes, uintptr_t output,
                                  int64_t output_bytes, int device, uintptr_t stream) {
    py::gil_scoped_release release;
    const CudaCall call{device, pointer(stream), nullptr, false};
    cuda::conformance(name, pointer(input), input_bytes, pointer(output), output_bytes, call);
  });
#endif
#if FLASHX_HAS_EMULATOR
  py::module_ emulated_part = m.def_submodule("cuda_emulated", "csrc/cuda on the emulator");
  bind_machine(emulated_part, cuda_emulated::machine());
  bind_emulator(emulated_part);
#endif
  m.def("build_info", &build_info);
}
