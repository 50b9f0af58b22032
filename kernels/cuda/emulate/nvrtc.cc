// NVRTC (libnvrtc.so.13) for driver.cc's card: it looks whether a source could be compiled as far as that can be seen without a compiler (its includes are there, the
// options are those that the bits depend on, the architecture exists), and its code says which unit it is and for what. The real one compiles the
// sources in tests/compile.rs.
//
// EMULATED_NVRTC_FAULT: old (12.4); new (13.2), which is none; fails, or fails:TEXT where name or a macro has the text; silent: fails without a word.
#include <cstdlib>
#include <cstring>
#include <map>
#include <set>
#include <string>
#include <vector>

namespace {
typedef int Result;
constexpr Result OK = 0, INVALID_INPUT = 3, INVALID_PROGRAM = 4, INVALID_OPTION = 5, COMPILATION = 6, INTERNAL = 11;
struct Program { std::string name, source, log, code; std::map<std::string, std::string> headers; };
/// Hopper's and Blackwell's names have features of their own.
const std::set<std::string> architectures = {"sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_100a", "sm_120", "sm_120a"};
const std::set<std::string> needed = {"--std=c++17", "-default-device", "--fmad=false", "--ftz=false", "--prec-div=true", "--prec-sqrt=true"};

std::string fault() { const char* given = getenv("EMULATED_NVRTC_FAULT"); return given ? given : ""; }
/// The first file that is included and not there. What is for the shim alone no compiler of NVIDIA's sees.
std::string missing(const Program& program, const std::string& text) {
    for (size_t at = 0; (at = text.find("#include \"", at)) != std::string::npos;) {
        at += 10;
        if (text.compare(at, 10, "cuda_shim.") == 0) continue;
        std::string name = text.substr(at, text.find('"', at) - at);
        auto header = program.headers.find(name);
        if (header == program.headers.end()) return name;
        std::string deeper = missing(program, header->second);
        if (!deeper.empty()) return deeper;
    }
    return "";
}
Result give(const std::string& text, char* to) { memcpy(to, text.c_str(), text.size() + 1); return OK; }
} // namespace

#define API extern "C" __attribute__((visibility("default"))) Result

API nvrtcVersion(int* major, int* minor) { *major = fault() == "old" ? 12 : 13; *minor = fault() == "old" ? 4 : fault() == "new" ? 2 : 0; return OK; }
API nvrtcCreateProgram(Program** made, const char* source, const char* name, int count, const char* const* texts, const char* const* names) {
    if (!made || !source) return INVALID_INPUT;
    auto* program = new Program{name ? name : "", source, "", "", {}};
    for (int i = 0; i < count; i++) program->headers[names[i]] = texts[i];
    *made = program;
    return OK;
}
API nvrtcDestroyProgram(Program** program) {
    if (!program || !*program) return INVALID_PROGRAM;
    delete *program;
    // Callers may have given a place that must not be written.
    return OK;
}
API nvrtcCompileProgram(Program* program, int count, const char* const* options) {
    if (!program) return INVALID_PROGRAM;
    std::set<std::string> left = needed;
    std::string unit = program->name, architecture;
    for (int i = 0; i < count; i++) {
        std::string option = options[i];
        auto value = [&](const char* name) { size_t length = strlen(name); return option.compare(0, length, name) ? std::string() : option.substr(length); };
        if (!value("--gpu-architecture=").empty()) architecture = value("--gpu-architecture=");
        else if (!value("--define-macro=").empty()) unit += " " + value("--define-macro=");
        else if (value("--ptxas-options=").empty() && !left.erase(option)) { program->log = "nvrtc: error: unrecognized option " + option + " found\n"; return INVALID_OPTION; }
    }
    if (!left.empty()) { program->log = "nvrtc: error: " + *left.begin() + " is not asked for, and the bits depend on it\n"; return INVALID_OPTION; }
    if (!architectures.count(architecture)) { program->log = "nvrtc: error: invalid value for --gpu-architecture (-arch)\n"; return INVALID_OPTION; }
    if (fault() == "silent") return INTERNAL;
    bool fails = fault() == "fails" || (fault().compare(0, 6, "fails:") == 0 && unit.find(fault().substr(6)) != std::string::npos);
    if (fails) { program->log = program->name + "(1): error: this compiler fails\n\n1 error detected in the compilation of \"" + program->name + "\".\n"; return COMPILATION; }
    std::string absent = missing(*program, program->source);
    if (!absent.empty()) { program->log = program->name + "(1): catastrophic error: cannot open source file \"" + absent + "\"\n"; return COMPILATION; }
    if (program->source.find("__global__") == std::string::npos) { program->log = "no kernel\n"; return COMPILATION; }
    program->code = std::string("\x7f" "ELF emulated\n") + unit + "\n" + architecture + "\n";
    return OK;
}
API nvrtcGetProgramLogSize(Program* program, size_t* bytes) { *bytes = program->log.size() + 1; return OK; }
API nvrtcGetProgramLog(Program* program, char* to) { return give(program->log, to); }
API nvrtcGetCUBINSize(Program* program, size_t* bytes) { *bytes = program->code.empty() ? 0 : program->code.size() + 1; return OK; }
API nvrtcGetCUBIN(Program* program, char* to) { return give(program->code, to); }
