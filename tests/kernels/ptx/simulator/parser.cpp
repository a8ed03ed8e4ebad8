// Reads PTX text into kernels.
#include <algorithm>
#include <cctype>
#include <cstdlib>

#include "decode.h"
#include "instructions.h"

namespace ptxsim {
namespace {
string trim(const string& s) {
  const size_t a = s.find_first_not_of(" \t\r\n"), b = s.find_last_not_of(" \t\r\n");
  return a == string::npos ? "" : s.substr(a, b - a + 1);
}
// The parts between commas that are not inside brackets.
vector<string> split(const string& s) {
  vector<string> out;
  int depth = 0;
  string part;
  for (const char c : s) {
    if (c == '[' || c == '{' || c == '(') ++depth;
    if (c == ']' || c == '}' || c == ')') --depth;
    if (c == ',' && depth == 0) {
      out.push_back(trim(part));
      part.clear();
    } else
      part += c;
  }
  if (!trim(part).empty()) out.push_back(trim(part));
  return out;
}
vector<string> words(const string& s) {
  vector<string> out;
  for (size_t i = 0; i < s.size();) {
    while (i < s.size() && isspace(u8(s[i]))) ++i;
    const size_t begin = i;
    while (i < s.size() && !isspace(u8(s[i]))) ++i;
    if (i > begin) out.push_back(s.substr(begin, i - begin));
  }
  return out;
}
size_t round_up(size_t n, size_t to) { return (n + to - 1) / to * to; }

u64 number(const string& s) {
  const char* c = s.c_str();
  if (s.size() > 2 && s[0] == '0' && (s[1] == 'f' || s[1] == 'F' || s[1] == 'd' || s[1] == 'D'))
    return strtoull(c + 2, nullptr, 16);
  if (s.size() > 2 && s[0] == '0' && (s[1] == 'b' || s[1] == 'B')) return strtoull(c + 2, nullptr, 2);
  return s[0] == '-' ? u64(strtoll(c, nullptr, 0)) : strtoull(c, nullptr, 0);
}

// ".shared .align 4 .b8 name[32] = {...}", a parameter too
struct Variable {
  string name;
  Space space = kShared;
  size_t size = 0, align = 1;
  bool dynamic = false;
  std::shared_ptr<u8> memory;
};
Variable read_variable(const string& s) {
  Variable v;
  const size_t equals = s.find('=');
  string declaration = trim(equals == string::npos ? s : s.substr(0, equals));
  const size_t bracket = declaration.find('[');
  size_t count = 1;
  if (bracket != string::npos) {
    count = 1;
    for (size_t b = bracket; b != string::npos; b = declaration.find('[', b + 1))
      count *= strtoull(declaration.c_str() + b + 1, nullptr, 10);
    declaration = trim(declaration.substr(0, bracket));
  }
  size_t element = 1;
  bool pointer = false;
  const vector<string> parts = words(declaration);
  for (size_t i = 0; i + 1 < parts.size(); ++i) {
    if (parts[i] == ".global") v.space = pointer ? v.space : kGlobal;
    if (parts[i] == ".const") v.space = pointer ? v.space : kConst;
    if (parts[i] == ".local") v.space = kLocal;
    if (parts[i] == ".param") v.space = kParam;
    if (parts[i] == ".extern") v.dynamic = true;
    if (parts[i] == ".ptr") pointer = true;  // what follows is about what it points to
    if (parts[i] == ".align" && !pointer) v.align = strtoull(parts[i + 1].c_str(), nullptr, 10);
    if (const Type t = type_of(parts[i].substr(1))) element = size_t(size_of(t));
  }
  v.name = parts.back();
  v.align = std::max(v.align, element);
  v.size = element * count;
  if (v.space != kGlobal && v.space != kConst) return v;
  v.memory.reset(static_cast<u8*>(aligned_alloc(256, round_up(v.size + 1, 256))), free);
  memset(v.memory.get(), 0, round_up(v.size + 1, 256));
  if (equals != string::npos) {
    string values = s.substr(equals + 1);
    std::replace_if(values.begin(), values.end(), [](char c) { return c == '{' || c == '}' || c == ','; }, ' ');
    size_t at = 0;
    for (const string& value : words(values)) {
      if (!isdigit(u8(value[0])) && value[0] != '-') fail("an initial value that is not a number: " + value);
      const u64 x = number(value);
      if (at + element <= v.size) memcpy(v.memory.get() + at, &x, element);
      at += element;
    }
  }
  return v;
}

class KernelReader {
 public:
  KernelReader(Kernel& kernel, const std::map<string, Variable>& variables) : k_(kernel), variables_(variables) {}

  void read_head(const string& parameters, const string& directives);
  // A body without comments; line_of: of each character.
  void read_body(const string& text, size_t begin, size_t end, const vector<int>& line_of);

 private:
  struct Scope {
    int parent;
    std::map<string, int> registers, labels, ranges;  // ranges: prefix of %r<75> and the first register
  };
  struct Jump {
    size_t instruction;
    string label;
    int scope;
  };

  int new_registers(int n) {
    const int first = k_.registers;
    k_.registers += n;
    return first;
  }
  int constant(Constant::Kind kind, int id, u64 value);
  int find_register(const string& name) const;
  int find_symbol(const string& name);
  int find_label(const string& label, int scope) const;
  int add_symbol(Symbol s);
  int place(const Variable& v);
  Operand operand(string s);
  Operand memory_operand(const string& s);
  void directive(const string& s);
  void instruction(const string& s, int line);
  void call_operands(Instruction& in, const string& arguments);
  void finish();

  Kernel& k_;
  const std::map<string, Variable>& variables_;
  vector<Scope> scopes_{{-1, {}, {}, {}}};
  int scope_ = 0, sink_ = -1, loc_file_ = -1, loc_line_ = 0;
  std::map<string, int> symbols_;
  std::map<string, vector<string>> tables_;  // of brx.idx
  std::map<std::pair<int, std::pair<int, u64>>, int> constants_;
  vector<Jump> jumps_;
};

int KernelReader::constant(Constant::Kind kind, int id, u64 value) {
  const auto [it, is_new] = constants_.try_emplace({int(kind), {id, value}}, 0);
  if (is_new) {
    it->second = new_registers(1);
    k_.constants.push_back({kind, id, value, it->second});
  }
  return it->second;
}

int KernelReader::find_register(const string& name) const {
  size_t e = name.size();
  while (e > 0 && isdigit(u8(name[e - 1]))) --e;
  for (int s = scope_; s >= 0; s = scopes_[size_t(s)].parent) {
    const Scope& scope = scopes_[size_t(s)];
    const auto it = scope.registers.find(name);
    if (it != scope.registers.end()) return it->second;
    if (e == name.size() || scope.ranges.empty()) continue;
    const auto range = scope.ranges.find(name.substr(0, e));
    if (range != scope.ranges.end()) return range->second + atoi(name.c_str() + e);
  }
  return -1;
}
int KernelReader::add_symbol(Symbol s) {
  symbols_[s.name] = int(k_.symbols.size());
  k_.symbols.push_back(std::move(s));
  return int(k_.symbols.size()) - 1;
}
int KernelReader::place(const Variable& v) {
  Symbol s;
  s.name = v.name, s.space = v.space, s.size = v.size, s.align = v.align, s.memory = v.memory;
  s.dynamic = v.dynamic && v.space == kShared;
  if (s.dynamic)
    k_.dynamic_align = std::max(k_.dynamic_align, v.align);
  else if (v.space == kShared) {
    s.offset = round_up(k_.shared_bytes, v.align);
    k_.shared_bytes = s.offset + v.size;
  } else if (v.space == kLocal) {
    s.offset = round_up(k_.local_bytes, std::max<size_t>(v.align, 16));
    k_.local_bytes = round_up(s.offset + v.size, 16);
  }
  return add_symbol(std::move(s));
}
// A variable of the module becomes the kernel's when it is first named.
int KernelReader::find_symbol(const string& name) {
  const auto it = symbols_.find(name);
  if (it != symbols_.end()) return it->second;
  const auto variable = variables_.find(name);
  return variable == variables_.end() ? -1 : place(variable->second);
}
int KernelReader::find_label(const string& label, int scope) const {
  for (int s = scope; s >= 0; s = scopes_[size_t(s)].parent) {
    const auto it = scopes_[size_t(s)].labels.find(label);
    if (it != scopes_[size_t(s)].labels.end()) return it->second;
  }
  fail("no such label: " + label);
}

Operand KernelReader::memory_operand(const string& s) {
  Operand o;
  o.kind = Operand::Memory;
  const vector<string> parts = split(s.substr(1, s.rfind(']') - 1));
  string base = parts[0];
  const size_t plus = base.find('+');
  if (plus != string::npos) {
    o.offset = s64(number(trim(base.substr(plus + 1))));
    base = trim(base.substr(0, plus));
  }
  o.reg = find_register(base);
  if (o.reg < 0) {
    if (isdigit(u8(base[0])))
      o.reg = constant(Constant::Value, 0, number(base));
    else {
      o.symbol = find_symbol(base);
      if (o.symbol < 0) fail("no such symbol: " + base);
      const Symbol& symbol = k_.symbols[size_t(o.symbol)];
      o.reg = symbol.space == kCall ? symbol.reg : constant(Constant::Address, o.symbol, 0);
    }
  }
  if (parts.size() > 1) o.parts = operand(parts[1]).parts;
  return o;
}

Operand KernelReader::operand(string s) {
  s = trim(s);
  Operand o;
  o.kind = Operand::Register;
  if (s[0] == '!') {
    o = operand(s.substr(1));
    o.negated = !o.negated;
    return o;
  }
  if (s[0] == '[') return memory_operand(s);
  if (s[0] == '{') {
    o.kind = Operand::Vector;
    for (const string& p : split(s.substr(1, s.size() - 2))) o.parts.push_back(operand(p));
    return o;
  }
  if (s == "_") {
    if (sink_ < 0) sink_ = new_registers(1);
    o.reg = sink_;
    return o;
  }
  if (isdigit(u8(s[0])) || s[0] == '-') {
    o.reg = constant(Constant::Value, 0, number(s));
    return o;
  }
  o.reg = find_register(s);
  if (o.reg >= 0) return o;
  if (s == "WARP_SZ") {
    o.reg = constant(Constant::Value, 0, 32);
    return o;
  }
  const int special = special_register(s);
  if (special >= 0) {
    o.reg = constant(Constant::Special, special, 0);
    return o;
  }
  const size_t plus = s.find('+');
  const int symbol = find_symbol(trim(s.substr(0, plus)));
  if (symbol < 0) fail("an operand that is not known: " + s);
  o.symbol = symbol;
  const Symbol& named = k_.symbols[size_t(symbol)];
  o.reg = named.space == kCall
              ? named.reg
              : constant(Constant::Address, symbol, plus == string::npos ? 0 : number(trim(s.substr(plus + 1))));
  return o;
}

void KernelReader::read_head(const string& parameters, const string& directives) {
  for (const string& one : split(parameters)) {
    const Variable v = read_variable(one);
    Symbol s;
    s.name = v.name, s.space = kParam, s.offset = round_up(k_.param_bytes, v.align), s.size = v.size;
    k_.param_offsets.push_back(s.offset), k_.param_sizes.push_back(v.size);
    k_.param_bytes = s.offset + v.size;
    add_symbol(std::move(s));
  }
  auto product = [&](const char* name) {  // of the numbers after a directive, 0 where it is not there
    size_t at = directives.find(name);
    if (at == string::npos) return 0;
    const char* c = directives.c_str() + at + strlen(name);
    char* end;
    long n = strtol(c, &end, 10);
    for (end += strspn(end, " \t\r\n"); *end == ','; end += strspn(end, " \t\r\n")) n *= strtol(end + 1, &end, 10);
    return int(n);
  };
  k_.threads = product(".reqntid");
  k_.cluster = product(".reqnctapercluster");
  if (const int most = product(".maxntid")) k_.most_threads = most;
  // What ptxas gives every lane of a block that has a multiprocessor's registers to itself.
  const int blocks = std::max(product(".minnctapersm"), 1);
  if (k_.threads || product(".maxntid"))
    k_.most_registers = std::min(65536 / (k_.threads ? k_.threads : k_.most_threads) / blocks, 255) / 8 * 8;
  if (const int most = product(".maxnreg")) k_.most_registers = most;
}

void KernelReader::directive(const string& s) {
  const vector<string> parts = words(s);
  if (parts[0] == ".reg") {
    for (const string& name : split(s.substr(s.find(parts[1]) + parts[1].size()))) {
      const size_t angle = name.find('<');
      Scope& scope = scopes_[size_t(scope_)];
      if (angle != string::npos)
        scope.ranges[name.substr(0, angle)] = new_registers(atoi(name.c_str() + angle + 1) + 1);
      else
        scope.registers[name] = new_registers(1);
    }
  } else if (parts[0] == ".loc") {
    loc_file_ = atoi(parts[1].c_str()), loc_line_ = atoi(parts[2].c_str());
  } else if (parts[0] == ".param") {  // of a call: a register
    Symbol symbol;
    symbol.name = read_variable(s).name, symbol.space = kCall, symbol.reg = new_registers(1);
    add_symbol(std::move(symbol));
  } else if (parts[0] == ".shared" || parts[0] == ".local" || parts[0] == ".const" || parts[0] == ".global") {
    place(read_variable(s));
  } else if (parts[0] != ".pragma")
    fail("a directive that is not known: " + s);
}

// call (result), name, (arguments);
void KernelReader::call_operands(Instruction& in, const string& arguments) {
  string target;
  for (const string& part : split(arguments))
    if (part[0] == '(')
      for (const string& name : split(part.substr(1, part.size() - 2))) in.ops.push_back(operand(name));
    else if (target.empty())
      target = part;
  in.mods.push_back(target);
}

void KernelReader::instruction(const string& s, int line) {
  Instruction in;
  in.text = s, in.line = line, in.scope = scope_, in.loc_file = loc_file_, in.loc_line = loc_line_;
  string rest = s;
  if (rest[0] == '@') {
    const size_t space = rest.find_first_of(" \t");
    string predicate = rest.substr(1, space - 1);
    if (predicate[0] == '!') in.negated = true, predicate = predicate.substr(1);
    in.pred = find_register(predicate);
    if (in.pred < 0) fail("no such predicate: " + s);
    rest = trim(rest.substr(space));
  }
  const size_t space = rest.find_first_of(" \t{[(");
  const string op = rest.substr(0, space), arguments = space == string::npos ? "" : trim(rest.substr(space));
  string name;
  for (size_t begin = 0; begin <= op.size();) {
    const size_t dot = std::min(op.find('.', begin), op.size());
    const string token = op.substr(begin, dot - begin);
    if (begin == 0)
      name = token;
    else
      in.mods.push_back(token);
    begin = dot + 1;
  }
  decode(in, name);
  if (in.flow == kBranch)
    jumps_.push_back({k_.code.size(), arguments, scope_});
  else if (in.flow == kBranchTable) {
    const vector<string> parts = split(arguments);
    in.ops.push_back(operand(parts[0]));
    in.mods.push_back(parts[1]);
  } else if (name == "call")
    call_operands(in, arguments);
  else if (in.flow == kPlain && in.run != run_nothing)
    for (const string& argument : split(arguments)) {
      const size_t bar = argument.find('|');
      if (bar != string::npos && argument[0] != '[' && argument[0] != '{') {
        in.ops.push_back(operand(argument.substr(0, bar)));
        in.ops.push_back(operand(argument.substr(bar + 1)));
        in.two_results = true;
      } else
        in.ops.push_back(operand(argument));
    }
  if (in.two_results && in.run != run_shfl && in.run != run_setp && in.run != run_match && in.run != run_elect)
    fail("an instruction of two results that the simulator does not know: " + s);
  // What a call takes and gives is moved through registers.
  const size_t symbol_at = in.run == run_ld ? 1 : 0;
  if ((in.run == run_ld || in.run == run_st) && in.ops[symbol_at].symbol >= 0 &&
      k_.symbols[size_t(in.ops[symbol_at].symbol)].space == kCall)
    in.run = run_mov, in.ops[symbol_at].kind = Operand::Register;
  if (in.run == run_wgmma || in.run == run_bulk_store || in.run == run_bulk_tensor_store)
    k_.reads_asynchronously = true;
  k_.code.push_back(std::move(in));
}

void KernelReader::read_body(const string& text, size_t begin, size_t end, const vector<int>& line_of) {
  size_t q = begin;
  int line = 0;
  try {
    while (true) {
      while (q < end && isspace(u8(text[q]))) ++q;
      if (q >= end) break;
      line = line_of[q];
      if (text[q] == '{') {
        scopes_.push_back({scope_, {}, {}, {}});
        scope_ = int(scopes_.size()) - 1;
        ++q;
        continue;
      }
      if (text[q] == '}') {
        scope_ = scopes_[size_t(scope_)].parent;
        ++q;
        continue;
      }
      size_t e = q;  // of a label?
      while (e < end && (isalnum(u8(text[e])) || text[e] == '_' || text[e] == '$' || text[e] == '%')) ++e;
      size_t colon = e;
      while (colon < end && (text[colon] == ' ' || text[colon] == '\t')) ++colon;
      if (e > q && text[colon] == ':' && text[colon + 1] != ':') {
        const string label = text.substr(q, e - q);
        q = colon + 1;
        size_t r = q;
        while (r < end && isspace(u8(text[r]))) ++r;
        if (text.compare(r, 14, ".branchtargets") == 0) {
          const size_t semicolon = text.find(';', r);
          tables_[label] = split(text.substr(r + 14, semicolon - r - 14));
          q = semicolon + 1;
        } else
          scopes_[size_t(scope_)].labels[label] = int(k_.code.size());
        continue;
      }
      const bool of_line = text.compare(q, 4, ".loc") == 0;
      size_t stop = q;
      int depth = 0;
      while (stop < end) {
        if (text[stop] == '{') ++depth;
        if (text[stop] == '}') --depth;
        if (of_line ? text[stop] == '\n' : text[stop] == ';' && depth == 0) break;
        ++stop;
      }
      string s = text.substr(q, stop - q);
      q = stop + 1;
      for (char& c : s)
        if (c == '\n' || c == '\t' || c == '\r') c = ' ';
      s = trim(s);
      if (s.empty()) continue;
      if (s[0] == '.')
        directive(s);
      else
        instruction(s, line);
    }
    finish();
  } catch (const std::exception& e) {
    fail(string(e.what()) + " [" + k_.name.substr(0, 120) + ", PTX line " + std::to_string(line) + "]");
  }
}

void KernelReader::finish() {
  for (const Jump& j : jumps_) k_.code[j.instruction].target = find_label(j.label, j.scope);
  for (Instruction& in : k_.code)
    if (in.flow == kBranchTable) {
      const auto table = tables_.find(in.mods.back());
      if (table == tables_.end()) fail("no such table of labels: " + in.mods.back());
      for (const string& label : table->second) in.targets.push_back(find_label(label, in.scope));
    }
  Instruction leave;
  leave.flow = kExit, leave.text = "the end";
  k_.code.push_back(leave);
  for (Symbol& s : k_.symbols)
    if (s.dynamic) s.offset = round_up(k_.shared_bytes, k_.dynamic_align);
}
}  // namespace

struct Module::Text {
  struct Entry {
    string parameters, directives;
    size_t begin, end;  // of the body
  };
  string clean;  // without comments
  vector<int> line_of;
  std::map<string, Variable> variables;
  std::map<string, Entry> entries;
  std::map<int, string> files;
};

Module::~Module() = default;

Module::Module(const string& text) : text_(std::make_unique<Text>()) {
  string& clean = text_->clean;
  clean.reserve(text.size());
  int line = 1;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '/' && i + 1 < text.size() && text[i + 1] == '/') {
      while (i < text.size() && text[i] != '\n') ++i;
      if (i >= text.size()) break;
    } else if (text[i] == '/' && i + 1 < text.size() && text[i + 1] == '*') {
      const size_t close = text.find("*/", i);
      if (close == string::npos) fail("a comment that does not end");
      i = close + 1;
      continue;
    }
    if (text[i] == '\n') ++line;
    clean += text[i];
    text_->line_of.push_back(line);
  }
  if (clean.find(".version") == string::npos) fail("not PTX: it has no .version");
  for (size_t at = 0;;) {
    while (at < clean.size() && isspace(u8(clean[at]))) ++at;
    if (at >= clean.size()) break;
    const bool of_line = clean.compare(at, 8, ".version") == 0 || clean.compare(at, 7, ".target") == 0 ||
                         clean.compare(at, 13, ".address_size") == 0 || clean.compare(at, 5, ".file") == 0;
    size_t stop = at;
    int depth = 0;
    bool equals = false;
    for (; stop < clean.size(); ++stop) {
      const char c = clean[stop];
      if (of_line ? c == '\n' : depth == 0 && (c == ';' || (c == '{' && !equals))) break;
      if (c == '(' || c == '{') ++depth;
      if (c == ')' || c == '}') --depth;
      if (c == '=') equals = true;
    }
    const string head = trim(clean.substr(at, stop - at));
    at = stop + 1;
    if (of_line) {
      const vector<string> parts = words(head);
      if (parts[0] == ".file" && parts.size() > 2) {
        const string quoted = head.substr(std::min(head.find('"') + 1, head.size()));
        string path = quoted.substr(0, quoted.find('"'));
        text_->files[atoi(parts[1].c_str())] = path.substr(path.rfind('/') + 1);
      }
      continue;
    }
    if (stop >= clean.size() || clean[stop] == ';') {
      if (head.find(".shared") != string::npos || head.find(".global") != string::npos ||
          head.find(".const") != string::npos) {
        const Variable v = read_variable(head);
        text_->variables[v.name] = v;
      }
      continue;
    }
    size_t close = at;
    for (depth = 1; depth > 0; ++close) {
      if (close >= clean.size()) fail("a body that does not end");
      if (clean[close] == '{') ++depth;
      if (clean[close] == '}') --depth;
    }
    const size_t entry = head.find(".entry");
    if (entry != string::npos) {
      const size_t open = head.find('(', entry), shut = open == string::npos ? open : head.find(')', open);
      const string after = head.substr(entry + 6);
      Text::Entry e;
      e.begin = at, e.end = close - 1;
      if (open != string::npos) e.parameters = head.substr(open + 1, shut - open - 1);
      e.directives = open == string::npos ? after : head.substr(shut + 1);
      const vector<string> parts = words(open == string::npos ? after : head.substr(entry + 6, open - entry - 6));
      text_->entries[parts.at(0)] = e;
    }
    at = close;
  }
}

Kernel* Module::find(const string& name) {
  const auto ready = kernels_.find(name);
  if (ready != kernels_.end()) return ready->second.get();
  const auto entry = text_->entries.find(name);
  if (entry == text_->entries.end()) return nullptr;
  auto kernel = std::make_unique<Kernel>();
  kernel->name = name, kernel->files = text_->files;
  KernelReader reader(*kernel, text_->variables);
  reader.read_head(entry->second.parameters, entry->second.directives);
  reader.read_body(text_->clean, entry->second.begin, entry->second.end, text_->line_of);
  return (kernels_[name] = std::move(kernel)).get();
}
vector<string> Module::names() const {
  vector<string> out;
  for (const auto& [name, entry] : text_->entries) out.push_back(name);
  return out;
}
}  // namespace ptxsim
