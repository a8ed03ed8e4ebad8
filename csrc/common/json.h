// JSON text, as much of it as facts and plans need: every function returns a value's text.
#pragma once

#include <cstdio>
#include <initializer_list>
#include <string>
#include <type_traits>
#include <utility>

namespace steepest::json {

inline std::string string(const std::string& value) {
  std::string out = "\"";
  for (const char c : value) {
    if (static_cast<unsigned char>(c) < 0x20) {
      char code[8];
      std::snprintf(code, sizeof code, "\\u%04x", c);
      out += code;
    } else {
      if (c == '"' || c == '\\') out += '\\';
      out += c;
    }
  }
  return out + '"';
}

// Floating point to the last bit; it must be finite.
template <class Number>
std::string number(Number value) {
  if constexpr (std::is_integral_v<Number>) return std::to_string(value);
  char digits[32];
  std::snprintf(digits, sizeof digits, "%.17g", static_cast<double>(value));
  return digits;
}

template <class Range, class Text>
std::string list(const Range& range, Text text) {
  std::string out;
  for (const auto& each : range) out += (out.empty() ? "" : ",") + text(each);
  return '[' + out + ']';
}

template <class Range>
std::string numbers(const Range& range) {
  return list(range, [](auto value) { return number(value); });
}

inline std::string object(std::initializer_list<std::pair<const char*, std::string>> fields) {
  std::string out;
  for (const auto& [name, value] : fields) out += (out.empty() ? "" : ",") + string(name) + ':' + value;
  return '{' + out + '}';
}

}  // namespace steepest::json
