// What the check runners share: a command line of words, and arrays in raw little-endian files.
// Tests only; the protocol is described in each runner.cpp.
#pragma once

#include <cstdint>
#include <cstring>
#include <fstream>
#include <map>
#include <sstream>
#include <stdexcept>
#include <string>
#include <vector>

#include "contract.h"

namespace bitcpm::checks {

inline void write_file(const std::string& path, const void* data, int64_t bytes) {
  std::ofstream file(path, std::ios::binary);
  file.write(static_cast<const char*>(data), bytes);
  if (!file.flush()) throw std::runtime_error(path + " cannot be written");
}

// OP key=value ...; whatever is missing or wrong throws std::runtime_error that names the key.
class Command {
 public:
  explicit Command(const std::string& line) {
    std::istringstream words(line);
    words >> op;
    for (std::string word; words >> word;) {
      const size_t equals = word.find('=');
      if (equals == std::string::npos) throw std::runtime_error("no value: " + word);
      values_[word.substr(0, equals)] = word.substr(equals + 1);
    }
  }

  std::string op;

  bool has(const std::string& key) const { return values_.count(key) != 0; }
  std::string get(const std::string& key, const std::string& otherwise) const {
    return has(key) ? values_.at(key) : otherwise;
  }
  std::string need(const std::string& key) const {
    if (!has(key)) throw std::runtime_error(op + " needs " + key + "=");
    return values_.at(key);
  }

  int64_t number(const std::string& key) const {
    const std::string text = need(key);
    size_t used = 0;
    int64_t value = -1;
    try {
      value = std::stoll(text, &used);
    } catch (const std::exception&) {
      used = 0;
    }
    if (text.empty() || used != text.size() || value < 0 || value > (int64_t{1} << 40))
      throw std::runtime_error(key + "=" + text + ": not a number from 0 to 2^40");
    return value;
  }
  int64_t number(const std::string& key, int64_t otherwise) const {
    return has(key) ? number(key) : otherwise;
  }
  bool flag(const std::string& key) const { return number(key, 0) != 0; }

  // Index of the value among `names`; without the key, the first.
  int choose(const std::string& key, const std::vector<std::string>& names) const {
    const std::string value = get(key, names.front());
    for (size_t index = 0; index < names.size(); ++index)
      if (value == names[index]) return static_cast<int>(index);
    throw std::runtime_error(key + "=" + value + ": unknown");
  }

  DType dtype() const {
    need("dtype");
    return static_cast<DType>(choose("dtype", {"f32", "bf16", "f16"}));
  }

  // Eight hexadecimal digits: the bits of a float32.
  float eps() const {
    const std::string text = need("eps");
    if (text.size() != 8 || text.find_first_not_of("0123456789abcdefABCDEF") != std::string::npos)
      throw std::runtime_error("eps=" + text + ": not eight hexadecimal digits");
    const uint32_t bits = static_cast<uint32_t>(std::stoul(text, nullptr, 16));
    float value;
    static_assert(sizeof value == sizeof bits, "float32");
    std::memcpy(&value, &bits, sizeof value);
    return value;
  }

  // Fills `data` from the file that `key` names, which has exactly so many bytes.
  void read(const std::string& key, void* data, int64_t bytes) const {
    std::ifstream file(need(key), std::ios::binary | std::ios::ate);
    if (!file || file.tellg() != std::streamoff(bytes))
      throw std::runtime_error(key + "=" + need(key) + ": not a file of " +
                               std::to_string(bytes) + " bytes");
    file.seekg(0);
    file.read(static_cast<char*>(data), bytes);
  }

 private:
  std::map<std::string, std::string> values_;
};

}  // namespace bitcpm::checks
