// The emulator's part of _C.cuda_emulated: settings, counts, and what the tests need.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/cuda.h"
#include "emulator/machine.h"
#include "emulator/testing.h"

namespace flashx {

inline void bind_emulator(pybind11::module_& m) {
  namespace py = pybind11;
  using Release = py::call_guard<py::gil_scoped_release>;
  py::register_exception<emulator::Fault>(m, "Fault", PyExc_RuntimeError);
  m.def("set_completion", [](const std::string& completion) {
    if (completion != "late" && completion != "early") {
      throw std::invalid_argument("completion: \"late\" or \"early\", got \"" + completion + "\"");
    }
    emulator::set_completion(completion == "late" ? emulator::Completion::Late : emulator::Completion::Early);
  });
  m.def("set_race_check", &emulator::set_race_check);
  m.def("set_workers", &emulator::set_workers);
  m.def("traffic", [] {
    std::vector<std::tuple<std::string, int64_t, int64_t>> rows;
    for (const emulator::Traffic& t : emulator::traffic()) rows.emplace_back(t.buffer, t.read, t.written);
    return rows;
  });
  m.def("counters", [] {
    py::dict counts;
    for (const auto& [name, count] : emulator::counters()) counts[py::str(name)] = count;
    return counts;
  });
  m.def("reset_traffic", &emulator::reset_traffic);
  m.def("conformance_names", &cuda_emulated::conformance_names);
  m.def(
      "conformance",
      [](const std::string& name, uintptr_t input, int64_t input_bytes, uintptr_t output, int64_t output_bytes) {
        cuda_emulated::conformance(name, reinterpret_cast<const void*>(input), input_bytes,
                                   reinterpret_cast<void*>(output), output_bytes, CudaCall{});
      },
      Release());
  m.def("seeded_bug_names", &cuda_emulated::seeded_bug_names);
  m.def(
      "seeded_bug",
      [](const std::string& name, uintptr_t input, int64_t input_bytes, uintptr_t output, int64_t output_bytes) {
        cuda_emulated::seeded_bug(name, reinterpret_cast<void*>(input), input_bytes, reinterpret_cast<void*>(output),
                                  output_bytes);
      },
      Release());
}

}  // namespace flashx
