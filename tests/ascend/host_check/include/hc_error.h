// Failure of a rule. Every check of the host implementation ends here.
#pragma once

#include <cstdarg>
#include <cstdio>
#include <stdexcept>
#include <string>

namespace host_check {

// A kernel broke a rule. what() is "rule: detail", one line.
class Error : public std::runtime_error {
 public:
  Error(std::string rule, const std::string& detail)
      : std::runtime_error(rule + ": " + detail), rule_(std::move(rule)) {}
  const std::string& rule() const { return rule_; }

 private:
  std::string rule_;
};

[[noreturn]] __attribute__((format(printf, 2, 3), cold, noinline)) inline void fail(
    const char* rule, const char* format, ...) {
  char detail[400];
  va_list args;
  va_start(args, format);
  std::vsnprintf(detail, sizeof detail, format, args);
  va_end(args);
  throw Error(rule, detail);
}

}  // namespace host_check
