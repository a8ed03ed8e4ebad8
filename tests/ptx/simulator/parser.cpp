// Reads PTX text into kernels.
#include <algorithm>

#include "decode.h"
#include "instructions.h"

namespace ptxsim {
namespace {
struct Parser {
  Kernel& k;
  std::map<string, int> ranges;  // prefix of %r<75> -> first register
  struct Scope {
    int parent;
    std::map<string, int> regs;
    std::map<string, int> labels;
  };
  vector<Scope> scopes{{-1, {}, {}}};
  int scope = 0;
  std::map<string, int> symbols;
  std::map<string, vector<string>> tables;  // of brx.idx

  int find_symbol(const string& n) const {
    auto it = symbols.find(n);
    return it == symbols.end() ? -1 : it->second;
  }

  int find_reg(const string& n) const {
    for (int s = scope; s >= 0; s = scopes[s].parent) {
      auto it = scopes[s].regs.find(n);
      if (it != scopes[s].regs.end()) return it->second;
    }
    size_t e = n.size();
    while (e > 0 && isdigit(n[e - 1])) --e;
    if (e < n.size()) {
      auto it = ranges.find(n.substr(0, e));
      if (it != ranges.end()) return it->second + atoi(n.c_str() + e);
    }
    return -1;
  }

  static string trim(const string& s) {
    size_t a = s.find_first_not_of(" \t\r\n"), b = s.find_last_not_of(" \t\r\n");
    return a == string::npos ? "" : s.substr(a, b - a + 1);
  }
  static vector<string> split(const string& s, char by) {  // not inside brackets
    vector<string> out;
    int depth = 0;
    string now;
    for (char c : s) {
      if (c == '[' || c == '{' || c == '(') ++depth;
      if (c == ']' || c == '}' || c == ')') --depth;
      if (c == by && depth == 0) {
        out.push_back(trim(now));
        now.clear();
      } else
        now += c;
    }
    if (!trim(now).empty()) out.push_back(trim(now));
    return out;
  }

  Operand operand(string s) {
    Operand o;
    s = trim(s);
    if (s == "_") {
      o.kind = Operand::Sink;
      return o;
    }
    if (s[0] == '!') {
      o = operand(s.substr(1));
      o.neg = !o.neg;
      return o;
    }
    if (s[0] == '{') {
      o.kind = Operand::Vec;
      for (auto& p : split(s.substr(1, s.size() - 2), ',')) o.parts.push_back(operand(p));
      return o;
    }
    if (s[0] == '[') {
      o.kind = Operand::Mem;
      auto parts = split(s.substr(1, s.size() - 2), ',');
      string base = parts[0];
      size_t plus = base.find('+');
      if (plus != string::npos) {
        o.offset = strtoll(base.c_str() + plus + 1, nullptr, 0);
        base = trim(base.substr(0, plus));
      }
      o.reg = find_reg(base);
      if (o.reg < 0) {
        o.sym = find_symbol(base);
        if (o.sym < 0) {
          if (isdigit(base[0]))
            o.offset += strtoll(base.c_str(), nullptr, 0);
          else
            fail("no such symbol: " + base);
        }
      }
      if (parts.size() > 1) {
        Operand c = operand(parts[1]);
        o.parts = c.parts;
      }
      return o;
    }
    if (isdigit(s[0]) || s[0] == '-') {
      o.kind = Operand::Imm;
      if (s.size() > 2 && s[0] == '0' && (s[1] == 'f' || s[1] == 'F'))
        o.imm = strtoul(s.c_str() + 2, nullptr, 16);
      else if (s.size() > 2 && s[0] == '0' && (s[1] == 'd' || s[1] == 'D'))
        o.imm = strtoull(s.c_str() + 2, nullptr, 16);
      else if (s[0] == '-')
        o.imm = u64(strtoll(s.c_str(), nullptr, 0));
      else
        o.imm = strtoull(s.c_str(), nullptr, 0);
      return o;
    }
    o.reg = find_reg(s);
    if (o.reg >= 0) {
      o.kind = Operand::Reg;
      return o;
    }
    auto sp = kSpecials.find(s);
    if (sp != kSpecials.end()) {
      o.kind = Operand::Special;
      o.special = sp->second;
      return o;
    }
    string base = s;
    size_t plus = s.find('+');
    if (plus != string::npos) {
      o.offset = strtoll(s.c_str() + plus + 1, nullptr, 0);
      base = trim(s.substr(0, plus));
    }
    o.sym = find_symbol(base);
    if (o.sym >= 0) {
      o.kind = Operand::Sym;
      return o;
    }
    if (s == "%envreg0" || s[0] == '%') fail("a register that is not known: " + s);
    fail("an operand that is not known: " + s);
  }
};
}  // namespace

Module read_module(const string& text) {
  Module module;
  string clean;
  clean.reserve(text.size());
  int line = 1;
  vector<int> line_of;
  for (size_t i = 0; i < text.size(); ++i) {
    if (text[i] == '/' && i + 1 < text.size() && text[i + 1] == '/') {
      while (i < text.size() && text[i] != '\n') ++i;
      --i;
      continue;
    }
    if (text[i] == '/' && i + 1 < text.size() && text[i + 1] == '*') {
      i = text.find("*/", i) + 1;
      continue;
    }
    if (text[i] == '\n') ++line;
    clean += text[i];
    line_of.push_back(line);
  }
  struct Var {
    string name;
    Space space;
    size_t size, align;
    bool dynamic;
    vector<u8> init;
  };
  vector<Var> module_vars;
  size_t at = 0;
  auto skip = [&] {
    while (at < clean.size() && isspace(clean[at])) ++at;
  };
  auto read_var = [&](const string& s) {  // ".shared .align 4 .b8 name[32]"
    Var v{"", kShared, 0, 1, false, {}};
    if (s.find(".global") != string::npos || s.find(".const") != string::npos) v.space = kGlobal;
    if (s.find(".local") != string::npos) v.space = kLocal;
    v.dynamic = s.find(".extern") != string::npos;
    size_t eq = s.find('=');
    string decl = eq == string::npos ? s : s.substr(0, eq);
    size_t al = decl.find(".align");
    if (al != string::npos) v.align = strtoul(decl.c_str() + al + 6, nullptr, 10);
    size_t esize = 1;
    for (auto& [n, t] : kTypes) {
      size_t p = decl.find("." + n + " ");
      if (p != string::npos) esize = std::max<size_t>(esize, size_of(t));
    }
    v.align = std::max(v.align, esize);
    size_t br = decl.find('[');
    string head = br == string::npos ? decl : decl.substr(0, br);
    size_t e = head.find_last_not_of(" \t\n"), b = head.find_last_of(" \t\n", e);
    v.name = head.substr(b + 1, e - b);
    size_t count = 1;
    if (br != string::npos) {
      count = decl[br + 1] == ']' ? 0 : strtoul(decl.c_str() + br + 1, nullptr, 10);
    }
    v.size = esize * count;
    v.init.assign(std::max<size_t>(v.size, 8), 0);
    if (eq != string::npos) {
      string vals = s.substr(eq + 1);
      size_t i = 0;
      size_t k = 0;
      while (i < vals.size()) {
        if (isdigit(vals[i]) || vals[i] == '-') {
          char* end;
          u64 x = (vals[i] == '0' && (vals[i + 1] == 'f' || vals[i + 1] == 'd'))
                      ? strtoull(vals.c_str() + i + 2, &end, 16)
                      : u64(strtoll(vals.c_str() + i, &end, 0));
          if ((k + 1) * esize <= v.init.size()) memcpy(&v.init[k * esize], &x, esize);
          ++k;
          i = end - vals.c_str();
        } else
          ++i;
      }
    }
    return v;
  };
  while (true) {
    skip();
    if (at >= clean.size()) break;
    size_t stop = at;
    int depth = 0;
    while (stop < clean.size()) {
      char c = clean[stop];
      if (c == '(') ++depth;
      if (c == ')') --depth;
      if (depth == 0 && (c == ';' || c == '{')) {
        if (c == '{' && clean.substr(at, stop - at).find('=') != string::npos) {
          while (clean[stop] != ';') ++stop;
        }
        break;
      }
      if (c == '\n') {
        string s = Parser::trim(clean.substr(at, stop - at));
        if (s.rfind(".version", 0) == 0 || s.rfind(".target", 0) == 0 || s.rfind(".address_size", 0) == 0 ||
            s.rfind(".file", 0) == 0)
          break;
      }
      ++stop;
    }
    string head = clean.substr(at, stop - at);
    const char end = stop < clean.size() ? clean[stop] : ';';
    at = stop + 1;
    if (end != '{') {
      string t = Parser::trim(head);
      if (t.find(".shared") != string::npos || t.find(".global") != string::npos || t.find(".const") != string::npos)
        module_vars.push_back(read_var(t));
      continue;
    }
    // a body
    size_t close = at;
    depth = 1;
    while (depth > 0) {
      if (clean[close] == '{') ++depth;
      if (clean[close] == '}') --depth;
      ++close;
    }
    const size_t body_begin = at, body_end = close - 1;
    at = close;
    size_t entry = head.find(".entry");
    if (entry == string::npos) continue;
    Kernel k;
    Parser p{k, {}, {{-1, {}, {}}}, 0, {}, {}};
    size_t open = head.find('(', entry), shut = head.rfind(')');
    string after = shut == string::npos ? head.substr(entry + 6) : head.substr(shut + 1);
    k.name = Parser::trim(
        head.substr(entry + 6, (open == string::npos ? head.find_first_of(" \n\t", entry + 8) : open) - entry - 6));
    auto add_symbol = [&](Symbol s) {
      p.symbols[s.name] = int(k.symbols.size());
      k.symbols.push_back(std::move(s));
    };
    if (open != string::npos)
      for (auto& one : Parser::split(head.substr(open + 1, shut - open - 1), ',')) {
        if (one.empty()) continue;
        Var v = read_var(one);
        k.param_bytes = (k.param_bytes + v.align - 1) / v.align * v.align;
        Symbol s;
        s.name = v.name;
        s.space = kParam;
        s.offset = k.param_bytes;
        s.size = v.size;
        k.param_offsets.push_back(k.param_bytes), k.param_sizes.push_back(v.size);
        k.param_bytes += v.size;
        add_symbol(s);
      }
    {
      size_t r = after.find(".maxntid");
      if (r == string::npos) r = after.find(".reqntid");
      if (r != string::npos) k.most_threads = atoi(after.c_str() + r + 8);
      r = after.find(".reqnctapercluster");
      if (r != string::npos) k.cluster = atoi(after.c_str() + r + 18);
    }
    size_t shared = 0;
    vector<const Var*> dynamic;
    const string body = clean.substr(body_begin, body_end - body_begin);
    auto place = [&](const Var& v) {
      Symbol s;
      s.name = v.name;
      s.space = v.space;
      s.size = v.size;
      s.align = v.align;
      s.dynamic = v.dynamic;
      s.init = v.init;
      if (v.space == kShared && !v.dynamic) {
        shared = (shared + v.align - 1) / v.align * v.align;
        s.offset = shared;
        shared += v.size;
      }
      if (v.space == kLocal) {
        k.local_bytes = (k.local_bytes + 15) / 16 * 16;
        s.offset = k.local_bytes;
        k.local_bytes += v.size;
      }
      if (v.dynamic) k.dynamic_align = std::max(k.dynamic_align, v.align);
      add_symbol(s);
    };
    for (const Var& v : module_vars)
      if (v.space != kShared || v.dynamic || body.find(v.name) != string::npos) place(v);
    auto new_regs = [&](int n) {
      int r = k.registers;
      k.registers += n;
      return r;
    };
    // statements
    size_t q = body_begin;
    struct Fix {
      int instr;
      string label;
      int scope;
    };
    vector<Fix> fixes;
    while (q < body_end) {
      while (q < body_end && isspace(clean[q])) ++q;
      if (q >= body_end) break;
      if (clean.compare(q, 5, ".loc ") == 0 || clean.compare(q, 5, ".loc\t") == 0) {  // a line, without a semicolon
        q = clean.find('\n', q);
        continue;
      }
      if (clean[q] == '{') {
        p.scopes.push_back({p.scope, {}, {}});
        p.scope = int(p.scopes.size()) - 1;
        ++q;
        continue;
      }
      if (clean[q] == '}') {
        p.scope = p.scopes[p.scope].parent;
        ++q;
        continue;
      }
      // a label?
      size_t e = q;
      while (e < body_end && (isalnum(clean[e]) || clean[e] == '_' || clean[e] == '$' || clean[e] == '%')) ++e;
      size_t colon = e;
      while (colon < body_end && (clean[colon] == ' ' || clean[colon] == '\t')) ++colon;
      if (e > q && clean[colon] == ':' && clean[colon + 1] != ':') {
        const string label = clean.substr(q, e - q);
        q = colon + 1;
        size_t r = q;
        while (isspace(clean[r])) ++r;
        if (clean.compare(r, 14, ".branchtargets") == 0) {
          size_t semi = clean.find(';', r);
          p.tables[label] = Parser::split(clean.substr(r + 14, semi - r - 14), ',');
          q = semi + 1;
        } else
          p.scopes[p.scope].labels[label] = int(k.code.size());
        continue;
      }
      size_t semi = q;
      int d = 0;
      while (semi < body_end) {
        if (clean[semi] == '{') ++d;
        if (clean[semi] == '}') --d;
        if (clean[semi] == ';' && d == 0) break;
        ++semi;
      }
      string s = clean.substr(q, semi - q);
      const int at_line = line_of[q];
      q = semi + 1;
      for (char& c : s)
        if (c == '\n' || c == '\t' || c == '\r') c = ' ';
      s = Parser::trim(s);
      if (s.empty()) continue;
      if (s[0] == '.') {
        if (s.rfind(".reg", 0) == 0) {
          size_t sp = s.find(' ', s.find('.', 4));
          for (auto& name : Parser::split(s.substr(sp), ',')) {
            size_t lt = name.find('<');
            if (lt != string::npos) {
              int n = atoi(name.c_str() + lt + 1);
              p.ranges[name.substr(0, lt)] = new_regs(n);
            } else
              p.scopes[p.scope].regs[name] = new_regs(1);
          }
        } else if (s.rfind(".shared", 0) == 0 || s.rfind(".local", 0) == 0 || s.rfind(".const", 0) == 0 ||
                   s.rfind(".global", 0) == 0)
          place(read_var(s));
        else if (s.rfind(".param", 0) == 0) {
          Var v = read_var(s);
          Symbol y;
          y.name = v.name;
          y.space = kCall;
          y.reg = new_regs(1);
          add_symbol(y);
        }
        continue;
      }
      Instruction in;
      in.text = s, in.line = at_line, in.scope = p.scope;
      string rest = s;
      if (rest[0] == '@') {
        size_t sp = rest.find(' ');
        string pr = rest.substr(1, sp - 1);
        if (pr[0] == '!') in.pred_neg = true, pr = pr.substr(1);
        in.pred = p.find_reg(pr);
        if (in.pred < 0) fail("no such predicate: " + s);
        rest = Parser::trim(rest.substr(sp));
      }
      size_t sp = rest.find_first_of(" {[(");
      string op = sp == string::npos ? rest : Parser::trim(rest.substr(0, sp));
      string args = sp == string::npos ? "" : Parser::trim(rest.substr(sp));
      vector<string> tokens;
      {
        string now;
        for (size_t i = 0; i < op.size(); ++i) {
          if (op[i] == '.') {
            tokens.push_back(now);
            now.clear();
          } else
            now += op[i];
        }
        tokens.push_back(now);
      }
      const string base = tokens[0];
      in.mods.assign(tokens.begin() + 1, tokens.end());
      decode(in, base);
      if (in.flow == kBranch)
        fixes.push_back({int(k.code.size()), args, p.scope});
      else if (in.flow == kBrx) {
        auto parts = Parser::split(args, ',');
        in.ops.push_back(p.operand(parts[0]));
        in.mods.push_back(parts[1]);
      } else if (base == "call") {
        auto parts = Parser::split(args, ',');
        vector<string> names;
        string target;
        for (auto& part : parts)
          if (part[0] == '(') {
            for (auto& n : Parser::split(part.substr(1, part.size() - 2), ',')) names.push_back(n);
          } else
            target = part;
        for (auto& n : names) {
          Operand o;
          o.kind = Operand::Sym;
          o.sym = p.find_symbol(n);
          in.ops.push_back(o);
        }
        in.mods.push_back(target);
      } else if (in.flow == kPlain && in.run != run_nop) {
        for (auto& a : Parser::split(args, ',')) {
          size_t bar = a.find('|');
          if (bar != string::npos && a[0] != '[' && a[0] != '{') {
            in.ops.push_back(p.operand(a.substr(0, bar)));
            in.ops.push_back(p.operand(a.substr(bar + 1)));
            if (base != "elect") in.c = 1;
          } else
            in.ops.push_back(p.operand(a));
        }
      }
      if (base == "shfl" && in.ops.size() == 6) in.c = 1;
      k.code.push_back(std::move(in));
    }
    auto find_label = [&](const string& label, int from) {
      for (int s = from; s >= 0; s = p.scopes[s].parent) {
        auto it = p.scopes[s].labels.find(label);
        if (it != p.scopes[s].labels.end()) return it->second;
      }
      fail("no such label: " + label);
    };
    for (const Fix& f : fixes) k.code[f.instr].target = find_label(f.label, f.scope);
    for (Instruction& in : k.code)
      if (in.flow == kBrx)
        for (auto& l : p.tables.at(in.mods.back())) in.targets.push_back(find_label(l, in.scope));
    Instruction leave;
    leave.flow = kExit;
    leave.text = "end";
    k.code.push_back(leave);
    k.shared_bytes = shared;
    for (Symbol& s : k.symbols)
      if (s.dynamic) s.offset = (shared + k.dynamic_align - 1) / k.dynamic_align * k.dynamic_align;
    auto kernel = std::make_unique<Kernel>(std::move(k));
    module.kernels[kernel->name] = std::move(kernel);
  }
  return module;
}
}  // namespace ptxsim
