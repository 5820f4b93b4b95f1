// Global memory: registered ranges, and for each byte which core wrote and which core read it.
#pragma once

#include <cstdint>
#include <cstring>
#include <string>
#include <vector>

#include "hc_error.h"

namespace host_check {

enum class Access { kIn, kOut, kInOut };

class GlobalMemory {
 public:
  void add(void* address, size_t bytes, Access access, const std::string& name) {
    Range range;
    range.begin = reinterpret_cast<uintptr_t>(address);
    range.end = range.begin + bytes;
    range.access = access;
    range.name = name;
    ranges_.push_back(range);
  }

  void start_launch() {
    for (Range& range : ranges_) {
      const size_t bytes = range.end - range.begin;
      range.writer.assign(range.access == Access::kIn ? 0 : bytes, 0);
      range.reader.assign(range.access == Access::kInOut ? bytes : 0, 0);
    }
  }

  void start_block(uint32_t block) {
    me_ = static_cast<uint8_t>(block + 1);
    own_reads_.clear();
    writes_before_read_.clear();
    writes_before_write_.clear();
  }

  // A read of [address, address + bytes) by the running core. `ordered(number)` tells whether the
  // reader follows the core's own write of that number.
  template <typename Ordered>
  void read(const void* address, size_t bytes, uint32_t number, const char* what,
            const Ordered& ordered) {
    if (bytes == 0) return;
    Range& range = find(address, bytes, what);
    if (range.access == Access::kIn) return;
    const size_t at = reinterpret_cast<uintptr_t>(address) - range.begin;
    const uint8_t* writer = range.writer.data() + at;
    bool own = false;
    for (size_t i = 0; i < bytes; ++i) {
      if (writer[i] == 0) {
        if (range.access == Access::kOut) {
          fail("gm-read-of-unwritten", "%s reads byte %zu of %s, which nothing has written", what,
               at + i, range.name.c_str());
        }
      } else if (writer[i] != me_) {
        fail("gm-read-of-other-core", "%s of core %d reads byte %zu of %s, which core %d writes",
             what, me_ - 1, at + i, range.name.c_str(), writer[i] - 1);
      } else {
        own = true;
      }
    }
    const Span span{reinterpret_cast<uintptr_t>(address),
                    reinterpret_cast<uintptr_t>(address) + bytes, number};
    if (own) check_spans(writes_before_read_, span, "written", what, ordered);
    if (range.access == Access::kInOut) {
      uint8_t* reader = range.reader.data() + at;
      for (size_t i = 0; i < bytes; ++i) {
        reader[i] = reader[i] == 0 || reader[i] == me_ ? me_ : kSeveral;
      }
      own_reads_.push_back(span);
    }
  }

  // A write. `after_write(number)` and `after_read(number)` tell whether the writer follows the
  // core's own earlier access of that number.
  template <typename AfterWrite, typename AfterRead>
  void write(const void* address, size_t bytes, uint32_t number, const char* what,
             const AfterWrite& after_write, const AfterRead& after_read) {
    if (bytes == 0) return;
    Range& range = find(address, bytes, what);
    const size_t at = reinterpret_cast<uintptr_t>(address) - range.begin;
    if (range.access == Access::kIn) {
      fail("gm-read-only", "%s writes byte %zu of the input %s", what, at, range.name.c_str());
    }
    uint8_t* writer = range.writer.data() + at;
    bool own_write = false;
    for (size_t i = 0; i < bytes; ++i) {
      if (writer[i] != 0 && writer[i] != me_) {
        fail("gm-write-overlap", "%s of core %d writes byte %zu of %s, which core %d writes too",
             what, me_ - 1, at + i, range.name.c_str(), writer[i] - 1);
      }
      own_write = own_write || writer[i] != 0;
    }
    const Span span{reinterpret_cast<uintptr_t>(address),
                    reinterpret_cast<uintptr_t>(address) + bytes, number};
    if (own_write) check_spans(writes_before_write_, span, "written", what, after_write);
    if (range.access == Access::kInOut) {
      const uint8_t* reader = range.reader.data() + at;
      bool own_read = false;
      for (size_t i = 0; i < bytes; ++i) {
        if (reader[i] != 0 && reader[i] != me_) {
          fail("gm-read-of-other-core",
               "%s of core %d writes byte %zu of %s, which another core reads", what, me_ - 1,
               at + i, range.name.c_str());
        }
        own_read = own_read || reader[i] != 0;
      }
      if (own_read) check_spans(own_reads_, span, "read", what, after_read);
    }
    std::memset(writer, me_, bytes);
    writes_before_read_.push_back(span);
    writes_before_write_.push_back(span);
  }

  // Bytes from `address` to the end of its buffer; `bytes` of them must be there.
  uint64_t room_at(const void* address, uint64_t bytes, const char* what) {
    if (bytes == 0) return 0;
    return find(address, bytes, what).end - reinterpret_cast<uintptr_t>(address);
  }

  // Every byte of an output has been written.
  void end_launch() const {
    for (const Range& range : ranges_) {
      if (range.access != Access::kOut) continue;
      for (size_t i = 0; i < range.writer.size(); ++i) {
        if (range.writer[i] == 0) {
          fail("gm-unwritten", "no core writes byte %zu of %s", i, range.name.c_str());
        }
      }
    }
  }

 private:
  static constexpr uint8_t kSeveral = 255;
  struct Range {
    uintptr_t begin = 0;
    uintptr_t end = 0;
    Access access = Access::kIn;
    std::string name;
    std::vector<uint8_t> writer;  // 0 none, else core + 1
    std::vector<uint8_t> reader;
  };
  struct Span {
    uintptr_t begin;
    uintptr_t end;
    uint32_t number;
  };

  Range& find(const void* address, size_t bytes, const char* what) {
    const uintptr_t at = reinterpret_cast<uintptr_t>(address);
    for (Range& range : ranges_) {
      if (at >= range.begin && at < range.end) {
        if (bytes > range.end - at) {
          fail("gm-out-of-bounds", "%s touches bytes %zu..%zu of %s, which has %zu", what,
               static_cast<size_t>(at - range.begin),
               static_cast<size_t>(at - range.begin) + bytes, range.name.c_str(),
               static_cast<size_t>(range.end - range.begin));
        }
        return range;
      }
    }
    fail("gm-out-of-bounds", "%s touches %zu bytes outside every buffer", what, bytes);
  }

  template <typename Ordered>
  static void check_spans(std::vector<Span>& spans, const Span& now, const char* verb,
                          const char* what, const Ordered& ordered) {
    size_t kept = 0;
    for (size_t i = 0; i < spans.size(); ++i) {
      if (ordered(spans[i].number)) continue;  // ordered now is ordered for good
      if (spans[i].begin < now.end && now.begin < spans[i].end) {
        fail("missing-sync",
             "%s touches global bytes that this core has %s, nothing orders the two", what, verb);
      }
      spans[kept++] = spans[i];
    }
    spans.resize(kept);
  }

  std::vector<Range> ranges_;
  std::vector<Span> own_reads_;
  std::vector<Span> writes_before_read_;   // dropped once ordered before later reads
  std::vector<Span> writes_before_write_;  // dropped once ordered before later writes
  uint8_t me_ = 1;
};

}  // namespace host_check
